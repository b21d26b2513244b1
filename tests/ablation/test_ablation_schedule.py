"""The schedule: several runs at a time, finished ones kept, failures reported, other recipes refused."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ablation_cases import LABELS, do, tiny_recipe, write_workplace

from echo_trainer import cli
from echo_trainer.ablation.arms import ARMS
from echo_trainer.ablation.choice import NotChosenError, choose_rates
from echo_trainer.ablation.data import fingerprints
from echo_trainer.ablation.files import ERROR, ITEMS, RESULT
from echo_trainer.ablation.plan import (
    Run,
    changed_parts,
    digest,
    final_runs,
    run_folder,
    selection_runs,
    specification,
)
from echo_trainer.ablation.results import load_items, load_result
from echo_trainer.ablation.schedule import CHOICE, Progress, run_all
from echo_trainer.files import write_json

pytestmark = pytest.mark.slow


class Watch(Progress):
    """Keeps what it was told."""

    def __init__(self):
        self.total, self.over, self.seen = 0, [], set()

    def start(self, total):
        self.total = total

    def update(self, run, what, done, total):
        self.seen.add((run, what))

    def finish(self, run, how):
        self.over.append((run, how))


def workers_of(parent: int) -> list[int]:
    """Process ids of the living workers of a process."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            state, ppid = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            if entry.name.isdigit() and int(ppid) == parent and state != "Z":
                found.append(int(entry.name))
        except (OSError, ValueError):
            continue
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def finished(output: Path) -> dict[str, int]:
    return {str(path.relative_to(output)): path.stat().st_mtime_ns for path in output.rglob(RESULT)}


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.long)])
def test_interrupted_and_continued(tmp_path, how):
    """Killed in the middle, its processes are gone; called again it does the rest and nothing twice."""
    recipe_file = write_workplace(tmp_path, seeds=[0, 1], arms=["lora", "echo", "echo-zero"])
    output = tmp_path / "out"
    arguments = ["ablate", str(recipe_file), "--output", str(output), "--jobs", "1", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "echo_trainer.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # jobs in the background ignore Ctrl-C, and hand that on
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 300
    while len(finished(output)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = workers_of(process.pid)
    assert workers
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "same command goes on" in errors
        assert "Traceback" not in errors
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))
    before = finished(output)
    assert 2 <= len(before) < 6
    assert cli.main(arguments) == 0
    after = finished(output)
    assert len(after) == 6
    assert {path: after[path] for path in before} == before
    assert not list(output.rglob("*.part"))
    assert (output / "report.md").is_file()


@pytest.fixture
def one_thread():
    """As the processes of `--threads 1` have: with another number sums are rounded in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_rounds_choice_and_match(tmp_path, one_thread):
    """Selection, choice on held-out examples, then all arms, then the matched one; equal to runs done here."""
    recipe = tiny_recipe(tmp_path, seeds=[0, 1], learning_rates=[0.001, 0.02], arms=["lora-compute-matched", "echo"])
    output, watch = tmp_path / "out", Watch()
    with pytest.raises(NotChosenError, match=r"0\.001"):
        choose_rates(recipe, output)
    outcome = run_all(recipe, output, {}, jobs=2, threads=1, progress=watch)
    assert not outcome.failed
    assert watch.total == len(outcome.done) == len(watch.over) == 8 + 6 - 4
    rates = json.loads((output / CHOICE).read_text())["lora"]
    for family in ("lora", "echo"):
        scores = rates[family]["held_out_nll"]
        assert rates[family]["chosen"] == float(min(scores, key=scores.get))
        assert rates[family]["at_the_end"]
    chosen = rates["lora"]["chosen"]
    matched = [run for run, _ in watch.over if "matched" in run]
    assert [run for run, _ in watch.over][-2:] == matched or set(matched) == {r for r, _ in watch.over[-2:]}
    assert {run for run, what in watch.seen if what == "training"} == set(outcome.done)

    again = run_all(recipe, output, {}, jobs=2)  # nothing to do, so no process is started
    assert (len(again.kept), again.done) == (10, [])

    # The same run, here, in a process that has done other things.
    here = do(recipe, tmp_path / "here", "lora", seed=1, rate=chosen)
    there = load_result(output, Run("lora", "lora", 1, chosen))
    assert here["tasks"] == there["tasks"]
    assert here["batches"] == there["batches"]
    mine, theirs = (load_items(folder, Run("lora", "lora", 1, chosen)) for folder in (tmp_path / "here", output))
    assert mine == theirs


def test_failed_runs_are_reported_and_tried_again(tmp_path, capsys):
    """A layer that does not exist fails the arms with an echo; the others are kept, and a repair finishes the rest."""
    recipe_file = write_workplace(tmp_path, {"echo_source_layers": [99]}, arms=["lora", "lora-compute-matched"])
    arguments = ["ablate", str(recipe_file), "--output", str(tmp_path / "out"), "--threads", "1"]
    assert cli.main(arguments) == 1
    said = capsys.readouterr().out
    assert "lora/echo/lr0.01/seed0" in said and "99" in said
    assert "lora/lora-compute-matched" in said and "no result yet" in said
    output = tmp_path / "out" / "runs" / "lora"
    assert (output / "lora" / "lr0.01" / "seed0" / RESULT).is_file()
    assert "99" in (output / "echo" / "lr0.01" / "seed0" / ERROR).read_text()


@pytest.mark.parametrize(("first", "second", "chosen"), [
    ((0.4, 0.4), (0.3, 2.0), 0.001), ((0.4, 0.4), (0.3, 0.45), 0.02), ((0.4, 0.4), (0.3, math.nan), 0.001),
])  # fmt: skip
def test_the_rate_is_chosen_on_several_seeds(tmp_path, first, second, chosen):
    """A rate that suits the first seed only, or ends a seed in NaN, is not taken."""
    recipe = tiny_recipe(tmp_path, seeds=[0, 1, 2], learning_rates=[0.001, 0.02], arms=["lora"], learning_rate_seeds=2)
    for rate, losses in zip((0.001, 0.02), (first, second), strict=True):
        for seed, loss in enumerate(losses):
            folder = run_folder(tmp_path, Run("lora", "lora", seed, rate))
            folder.mkdir(parents=True)
            (folder / RESULT).write_text(json.dumps({"held_out_nll": loss}))
    choice = choose_rates(recipe, tmp_path)["lora"]["lora"]
    assert choice["chosen"] == chosen
    assert choice["seeds"] == [0, 1]


@pytest.mark.long
def test_a_dead_process_is_a_failed_run(tmp_path):
    recipe = tiny_recipe(tmp_path, arms=["lora"], seeds=[0, 1])

    class Kill(Watch):
        def update(self, run, what, done, total):
            if not self.seen:
                os.kill(workers_of(os.getpid())[0], signal.SIGKILL)
            super().update(run, what, done, total)

    output, watch = tmp_path / "out", Kill()
    outcome = run_all(recipe, output, {}, threads=1, progress=watch)
    assert len(outcome.failed) == 1 and len(outcome.done) == 1
    assert "ended" in next(iter(outcome.failed.values()))
    failed = output / "runs" / next(iter(outcome.failed))
    outcome = run_all(recipe, output, {}, threads=1)
    assert len(outcome.done) == 1 and len(outcome.kept) == 1
    assert not (failed / ERROR).exists()


def test_results_of_another_recipe_are_refused(tmp_path):
    recipe = tiny_recipe(tmp_path, arms=["lora"])
    output = tmp_path / "out"
    do(recipe, output, "lora")
    other = tiny_recipe(tmp_path, {"max_steps": 5}, arms=["lora"])
    with pytest.raises(ValueError, match=r"training.max_steps was 3, is 5.*new --output"):
        run_all(other, output, {})
    with pytest.raises(ValueError, match="fingerprints"):
        run_all(recipe, output, {"base": "another"})
    assert run_all(recipe, output, {}).kept == ["lora/lora/lr0.01/seed0"]
    more = tiny_recipe(tmp_path, arms=["lora"], evaluation_batch_size=3)  # changes no result
    assert run_all(more, output, {}).kept == ["lora/lora/lr0.01/seed0"]


def test_fingerprints_follow_the_content_not_the_path(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, other = (tiny_recipe(tmp_path / name) for name in "ab")
    assert fingerprints(one) == fingerprints(other)
    run = Run("echo", "lora", 0, 0.01)
    assert digest(specification(one, run, {})) == digest(specification(other, run, {}))
    (tmp_path / "b" / "test.jsonl").write_text('{"prompt": "w1", "completion": " w2"}\n')
    changed = fingerprints(other)
    assert changed.pop("test words") != fingerprints(one)["test words"]
    assert changed.items() <= fingerprints(one).items()


def test_every_run_is_planned_once_and_named_by_what_it_is(tmp_path):
    recipe = tiny_recipe(
        tmp_path, arms=[*ARMS], **LABELS, adapters=["lora", "dora"], seeds="0-4", learning_rates=[1e-3, 1e-2]
    )
    rates = {adapter: dict.fromkeys(ARMS, 1e-3) for adapter in ("lora", "dora")}
    runs = final_runs(recipe, rates)
    assert len(runs) == len({run.id for run in runs}) == len(ARMS) * 2 * 5
    assert {run.seed for run in runs[:24]} == {0}  # whole pairs first
    assert len(selection_runs(recipe)) == 5 * 2 * 2 * 3  # families, adapters, rates, the first three seeds
    assert {run.arm for run in selection_runs(recipe)} == {"lora", "lora-unmasked", "lora-longer", "echo", "strong"}
    every = tiny_recipe(tmp_path, arms=[*ARMS], **LABELS, learning_rates=[1e-3, 1e-2], learning_rate_choice="arm")
    n_seeds = len(every.seeds[: every.learning_rate_seeds])
    matched = sum(arm.flops_of is not None for arm in ARMS.values())  # they have no rate of their own
    assert len(selection_runs(every)) == (len(ARMS) - matched) * 2 * n_seeds
    shared = tiny_recipe(tmp_path, arms=[*ARMS], **LABELS, learning_rates=[1e-3, 1e-2], learning_rate_choice="shared")
    assert {run.arm for run in selection_runs(shared)} == {"lora"}


def test_changes_are_said_in_words():
    old, new = {"a": 1, "t": {"x": 1, "y": 2}}, {"a": 1, "t": {"x": 3, "y": 2}, "z": 0}
    assert changed_parts(old, new) == ["t.x was 1, is 3", "z was None, is 0"]


def test_files_are_whole_or_not_there(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / ITEMS, {"no": object()})
    assert not list(tmp_path.iterdir())
