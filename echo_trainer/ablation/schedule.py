"""Carry out the runs of an ablation: several at a time, finished ones kept, failed ones reported.

Rounds: runs that choose the learning rates; all others; those whose number of steps follows from finished ones.
"""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from ..files import write_json, write_text
from .arms import ARMS, BASELINE
from .choice import choose_rates
from .files import ERROR
from .plan import Run, family_of, final_runs, selection_runs, specification
from .recipe import AblationRecipe
from .results import is_finished, load_result

CHOICE = "learning_rates.json"


@dataclass
class Outcome:
    """What became of the runs: `done` in this call, `kept` from earlier ones, `failed` with their error."""

    done: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


class Progress(Protocol):
    """Told what happens; the command line draws a bar."""

    def start(self, total: int) -> None:
        """`total` runs are planned."""

    def update(self, run: str, what: str, done: int, total: int) -> None:
        """A run has got further."""

    def finish(self, run: str, how: str) -> None:
        """A run is over: "done", "kept" or "failed"."""


class _Silent(Progress):
    """Draws nothing."""


def run_all(
    recipe: AblationRecipe,
    output: Path,
    fingerprints: dict[str, str],
    *,
    jobs: int = 1,
    threads: int | None = None,
    devices: list[str] | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """
    Carry out every run that has no result yet.

    Args:
        recipe: what to compare.
        output: folder of the ablation.
        fingerprints: of base and data (`data.fingerprints`).
        jobs: runs at a time, each in a process of its own.
        threads: CPU threads of each; None shares the cores out.
        devices: indices of GPUs, given to the processes in turn; None leaves them as they are.
        progress: told what happens.

    Returns:
        What became of the runs. Those that failed are tried again by the next call.

    Raises:
        ValueError: a result on disk belongs to another recipe. Nothing is run then.
    """
    outcome, progress = Outcome(), progress or _Silent()
    selection = selection_runs(recipe)
    known = {run.id: specification(recipe, run, fingerprints) for run in selection}
    for run in selection:
        is_finished(output, run, known[run.id])
    with _Pool(recipe, output, jobs, threads, devices, progress) as pool:
        planned = len(selection) + len(final_runs(recipe, _any_rates(recipe)))
        if selection:  # one rate of each family is a final run as well
            planned -= len(selection) // len(recipe.learning_rates)
        progress.start(planned)
        _round(pool, selection, outcome, recipe, fingerprints)
        if outcome.failed:
            return outcome
        rates = choose_rates(recipe, output)
        write_json(output / CHOICE, rates)
        chosen = {a: {f: entry["chosen"] for f, entry in families.items()} for a, families in rates.items()}
        finals = [run for run in final_runs(recipe, chosen) if run.id not in known]
        _round(pool, [run for run in finals if not ARMS[run.arm].flops_of], outcome, recipe, fingerprints)
        matched = [matched_run(recipe, run, output, chosen) for run in finals if ARMS[run.arm].flops_of]
        for run, reason in matched:
            if reason:
                outcome.failed[run.id] = reason
                progress.finish(run.id, "failed")
        _round(pool, [run for run, reason in matched if not reason], outcome, recipe, fingerprints)
    return outcome


def matched_run(
    recipe: AblationRecipe, run: Run, output: Path, rates: dict[str, dict[str, float]]
) -> tuple[Run, str | None]:
    """The run with the number of steps that spends the FLOPs of its arm's reference, or why there is none yet."""
    found, reference_arm = {}, ARMS[run.arm].flops_of
    assert reference_arm is not None  # else the run has the steps of the recipe
    for name in (BASELINE, reference_arm):
        rate = rates[run.adapter][family_of(ARMS[name], recipe.learning_rate_choice)]
        reference = load_result(output, Run(name, run.adapter, run.seed, rate))
        if reference is None:
            return run, f"The run of {name} that gives its number of steps has no result yet."
        found[name] = reference
    base, spent = found[BASELINE], found[reference_arm]["flops"]
    return replace(run, max_steps=max(1, round(base["steps"] * spent / base["flops"]))), None


def _any_rates(recipe: AblationRecipe) -> dict[str, dict[str, float]]:
    first = dict.fromkeys(ARMS, recipe.learning_rates[0])
    return dict.fromkeys(recipe.adapters, first)


def _round(
    pool: "_Pool", runs: list[Run], outcome: Outcome, recipe: AblationRecipe, fingerprints: dict[str, str]
) -> None:
    specs = {run.id: specification(recipe, run, fingerprints) for run in runs}
    waiting = []
    for run in runs:
        if is_finished(pool.output, run, specs[run.id]):
            outcome.kept.append(run.id)
            pool.progress.finish(run.id, "kept")
        else:
            waiting.append({"run": asdict(run), "spec": specs[run.id]})
    pool.carry_out(waiting, outcome)


class _Pool:
    """Worker processes. They live as long as the pool and do one run after another."""

    def __init__(
        self,
        recipe: AblationRecipe,
        output: Path,
        jobs: int,
        threads: int | None,
        devices: list[str] | None,
        progress: Progress,
    ):
        self.recipe, self.output, self.jobs, self.progress = recipe, output, jobs, progress
        self.threads = threads or max(1, (os.cpu_count() or 1) // jobs)
        self.devices = devices
        self.events: queue.Queue[tuple[int, dict[str, Any]]] = queue.Queue()
        self.workers: dict[int, subprocess.Popen] = {}

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *exception: Any) -> None:
        for worker in self.workers.values():
            worker.kill()
            worker.wait()

    def carry_out(self, waiting: list[dict[str, Any]], outcome: Outcome) -> None:
        """Do these runs, in this order as far as several at a time have one."""
        waiting = list(waiting)
        running: dict[int, str] = {}
        for place in range(min(self.jobs, len(waiting))):
            self._give(place, waiting, running)
        while running:
            place, event = self.events.get()
            run = running.get(place)
            if event["event"] == "progress" and run is not None:
                self.progress.update(run, event["what"], event["done"], event["total"])
            elif event["event"] == "ended" and self.workers.get(place) is event["worker"]:
                del self.workers[place]
                if run is not None:
                    event = {"event": "failed", "error": f"Its process ended with status {event['status']}."}
            if event["event"] in ("finished", "failed") and run is not None:
                self._settle(run, event, outcome)
                del running[place]
                if waiting:
                    self._give(place, waiting, running)

    def _settle(self, run: str, event: dict[str, Any], outcome: Outcome) -> None:
        error = self.output / "runs" / run / ERROR
        if event["event"] == "finished":
            outcome.done.append(run)
            error.unlink(missing_ok=True)
            self.progress.finish(run, "done")
        else:
            outcome.failed[run] = event["error"]
            write_text(error, event["error"])
            self.progress.finish(run, "failed")

    def _give(self, place: int, waiting: list[dict[str, Any]], running: dict[int, str]) -> None:
        job = waiting.pop(0)
        running[place] = Run(**job["run"]).id
        worker = self.workers.get(place) or self._start(place)
        assert worker.stdin is not None  # a pipe
        try:
            worker.stdin.write(json.dumps(job) + "\n")
            worker.stdin.flush()
        except BrokenPipeError:
            return  # it has ended, and its event says so

    def _start(self, place: int) -> subprocess.Popen:
        environment = dict(os.environ, OMP_NUM_THREADS=str(self.threads), TOKENIZERS_PARALLELISM="false")
        if self.devices:
            environment["CUDA_VISIBLE_DEVICES"] = self.devices[place % len(self.devices)]
        self.output.mkdir(parents=True, exist_ok=True)
        with (self.output / f"worker{place}.log").open("a") as log:
            worker = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.worker", str(self.output), json.dumps(asdict(self.recipe))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches this process only, which ends them
            )
        self.workers[place] = worker
        threading.Thread(target=_forward, args=(worker, place, self.events.put), daemon=True).start()
        return worker


def _forward(worker: subprocess.Popen, place: int, put: Callable[[tuple[int, dict[str, Any]]], None]) -> None:
    assert worker.stdout is not None  # a pipe
    for line in worker.stdout:
        put((place, json.loads(line)))
    put((place, {"event": "ended", "worker": worker, "status": worker.wait()}))
