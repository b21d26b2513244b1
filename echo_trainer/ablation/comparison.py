"""Every comparison that the report shows, computed from the runs on disk."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .arms import ARMS, BASELINE, find_arms
from .plan import Run, family_of
from .recipe import AblationRecipe
from .results import load_items, load_result
from .statistics import Comparison, compare, holm

METRICS = ("accuracy", "nll")
_KEY = {"accuracy": "correct", "nll": "nll"}
CONTRASTS = (
    ("echo", "echo-zero", "the injection, everything else kept"),
    ("echo", "echo-shuffled", "the sample's own echo instead of another's"),
    ("echo", "echo-noise", "an echo instead of noise"),
    ("echo", "lora-compute-matched", "the same compute spent on more steps"),
    ("echo", "echo-no-kd", "the distillation"),
    ("echo", "echo-no-routing", "routing some of the samples instead of all"),
    ("echo-no-routing", "echo-zero-no-routing", "the injection where every sample is routed"),
    ("strong", "strong-zero", "the strong injection, everything else kept"),
    ("strong", "strong-shuffled", "the sample's own strong echo instead of another's"),
    ("strong", "strong-noise", "a strong echo instead of noise"),
    ("strong", "lora-longer", "the strong echo instead of half as many steps again"),
    ("strong", "lora-strong-matched", "the same compute spent on more steps"),
    ("strong-labels", "strong-plain-labels", "answers of the echo pass instead of the plain pass of the same weights"),
    ("strong-labels", "self-training", "answers of the echo pass instead of LoRA's own"),
    ("strong-labels", "strong", "the second training, on answers of the echo pass"),
    ("self-training", "lora-longer", "the second training, on its own answers"),
)


@dataclass
class ArmRuns:
    """
    Finished runs of an arm and adapter.

    Attributes:
        results: `result.json` by seed.
        items: items by seed.
    """

    results: dict[int, dict[str, Any]] = field(default_factory=dict)
    items: dict[int, dict[str, dict[str, list]]] = field(default_factory=dict)

    def mean(self, key: str, task: str | None = None) -> float:
        """Mean over seeds of a number of the results; accuracy and NLL are of `task`, or the mean of the tasks."""
        values = []
        for result in self.results.values():
            if key in METRICS:
                tasks = [result["tasks"][task]] if task else list(result["tasks"].values())
                values.append(np.mean([entry[key] for entry in tasks]))
            elif result.get(key) is not None:
                values.append(result[key])
        return float(np.mean(values)) if values else math.nan


def collect(recipe: AblationRecipe, output: Path, rates: dict[str, Any]) -> dict[str, dict[str, ArmRuns]]:
    """Finished runs by adapter and arm."""
    found: dict[str, dict[str, ArmRuns]] = {}
    for adapter in recipe.adapters:
        for arm in find_arms(recipe.arms):
            rate = rates[adapter][family_of(arm, recipe.learning_rate_choice)]["chosen"]
            runs = ArmRuns()
            for seed in recipe.seeds:
                run = Run(arm.name, adapter, seed, rate)
                result = load_result(output, run)
                if result is not None:
                    runs.results[seed], runs.items[seed] = result, load_items(output, run)
            if runs.results:
                found.setdefault(adapter, {})[arm.name] = runs
    return found


def paired(
    one: ArmRuns, other: ArmRuns, metric: str, tasks: list[str], of_the_echo: bool = False, both: bool = False
) -> Comparison | None:
    """
    `one` minus `other` over the seeds that both have; None where there is none.

    Args:
        one, other: runs of two arms, or of one.
        metric: one of `METRICS`.
        tasks: names of the test sets.
        of_the_echo: take the figures of the echo pass for `one`.
        both: and for `other`.
    """
    key = _KEY[metric]
    mine = f"echo_{key}" if of_the_echo else key
    key = mine if both else key
    seeds = [
        s
        for s in one.items
        if s in other.items and all(mine in one.items[s][task] and key in other.items[s][task] for task in tasks)
    ]
    if not seeds:
        return None
    return compare(
        [
            np.array([np.subtract(one.items[s][task][mine], other.items[s][task][key], dtype=float) for s in seeds])
            for task in tasks
        ]
    )


def check_pairs(runs: dict[str, ArmRuns]) -> list[str]:
    """Where arms of a seed did not start from the same weights or did not see the same batches, in words."""
    faults = []
    base = runs.get(BASELINE, ArmRuns()).results
    for arm, found in runs.items():
        for seed, result in found.results.items():
            if seed not in base:
                continue
            same = min(len(result["batches"]), len(base[seed]["batches"]))
            if result["batches"][:same] != base[seed]["batches"][:same]:
                faults.append(f"{arm}, seed {seed}: other batches than {BASELINE}")
            if result["initial_weights"] != base[seed]["initial_weights"]:
                faults.append(f"{arm}, seed {seed}: other initial weights than {BASELINE}")
    return faults


def summarise(recipe: AblationRecipe, output: Path, rates: dict[str, Any]) -> dict[str, Any]:
    """
    All numbers of the report, ready for JSON.

    Returns:
        By adapter: `arms` (means, ratios and comparisons with `lora`), `contrasts`, `echo_passes` (those of the arms
        beside plain paths), `tasks`, `faults`.
    """
    summary: dict[str, Any] = {}
    for adapter, runs in collect(recipe, output, rates).items():
        tasks = list(next(iter(next(iter(runs.values())).items.values())))
        rows = {arm: _row(arm, found, runs, tasks) for arm, found in runs.items()}
        for metric in METRICS:
            shown = [row for row in rows.values() if row[metric]["to_lora"]]
            for row, p in zip(shown, holm([row[metric]["to_lora"]["p"] for row in shown]), strict=True):
                row[metric]["to_lora"]["holm"] = p
        summary[adapter] = {
            "arms": rows,
            "contrasts": _contrasts(runs, tasks),
            "echo_passes": _echo_passes(runs, tasks),
            "tasks": tasks,
            "n_items": {task: len(next(iter(runs.values())).items[_first(runs)][task]["correct"]) for task in tasks},
            "faults": check_pairs(runs),
            "rates": rates[adapter],
        }
    return summary


def _first(runs: dict[str, ArmRuns]) -> int:
    return next(iter(next(iter(runs.values())).items))


def _row(arm: str, found: ArmRuns, runs: dict[str, ArmRuns], tasks: list[str]) -> dict[str, Any]:
    base = runs.get(BASELINE)
    # On a shared CPU the clock on the wall measures the neighbours as well.
    on_cpu = all(result["device"] == "CPU" for result in found.results.values())
    clock = "training_cpu_seconds" if on_cpu else "training_seconds"
    row: dict[str, Any] = {
        "what": ARMS[arm].what,
        "seeds": sorted(found.results),
        "steps": found.mean("steps"),
        "loss_weight": found.mean("loss_weight"),
        "training_seconds": found.mean("training_seconds"),
        "training_cpu_seconds": found.mean("training_cpu_seconds"),
        "peak_memory": found.mean("peak_memory"),
        "flops": found.mean("flops"),
        "flops_ratio": found.mean("flops") / base.mean("flops") if base else math.nan,
        "time_ratio": found.mean(clock) / base.mean(clock) if base else math.nan,
        "clock": clock,
    }
    for metric in METRICS:
        other = base if arm != BASELINE else None
        pairs = {task: paired(found, other, metric, [task]) for task in tasks} if other is not None else {}
        macro = paired(found, other, metric, tasks) if other is not None else None
        row[metric] = {
            "mean": found.mean(metric),
            "by_task": {task: found.mean(metric, task) for task in tasks},
            "to_lora": asdict(macro) if macro else None,
            "to_lora_by_task": {task: asdict(pair) for task, pair in pairs.items() if pair},
        }
    return row


def _echo_passes(runs: dict[str, ArmRuns], tasks: list[str]) -> list[dict[str, Any]]:
    """
    The echo pass of each arm that has one beside its own plain path and beside LoRA, trained longer or not, and beside
    the echo passes of the arms that it is contrasted with (`other_echo`).
    """
    found = []
    for arm, mine in runs.items():
        others = [(other, False) for other in dict.fromkeys([arm, *(o for o in runs if o.startswith(BASELINE))])]
        others += [(other, True) for one, other, _ in CONTRASTS if one == arm and other in runs]
        for other, both in others:
            pairs = {metric: paired(mine, runs[other], metric, tasks, True, both) for metric in METRICS}
            known = {metric: asdict(pair) for metric, pair in pairs.items() if pair}
            if len(known) == len(pairs):
                means = {f"mean_{metric}": _echo_mean(mine, metric, tasks) for metric in METRICS}
                found.append({"arm": arm, "other": other, "other_echo": both, **means, **known})
    return found


def _echo_mean(runs: ArmRuns, metric: str, tasks: list[str]) -> float:
    """Mean over seeds and test sets of the echo pass's figure."""
    key = f"echo_{_KEY[metric]}"
    return float(np.mean([[np.mean(items[task][key]) for task in tasks] for items in runs.items.values()]))


def _contrasts(runs: dict[str, ArmRuns], tasks: list[str]) -> list[dict[str, Any]]:
    found = []
    for one, other, what in CONTRASTS:
        if one in runs and other in runs:
            pairs = {metric: paired(runs[one], runs[other], metric, tasks) for metric in METRICS}
            known = {metric: asdict(pair) for metric, pair in pairs.items() if pair}
            if len(known) == len(pairs):
                weights = [runs[arm].mean("loss_weight") for arm in (one, other)]
                found.append({"one": one, "other": other, "what": what, "loss_weights": weights, **known})
    for metric in METRICS:
        for entry, p in zip(found, holm([entry[metric]["p"] for entry in found]), strict=True):
            entry[metric]["holm"] = p
    return found
