"""The figures of an evaluation with their intervals, and their entry in the record and the card of a run."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from ..report.folder import RUN_RECORD, update_record
from .evaluate import Record, Task, accuracy

Z95 = 1.959963984540054  # two-sided 95 % of the normal distribution


def task_result(task: Task, records: Sequence[Record], mode: str) -> dict[str, Any]:
    """
    The figure of a task, in the form of `echo_run.json`: task, dataset, split, metric, value, n, of, interval, seeds.

    `of` is the number of rows that the n items were drawn from, None where these are all there are.

    Accuracy has Wilson's 95 % interval; it covers the choice of the items, not of the training seed. In mode "nll" the
    value is the mean negative log-likelihood of a reference, in nats, with a normal interval.
    """
    part = task.n_rows if task.n_rows != len(task.items) else None
    result = {"task": task.name, "dataset": task.dataset, "split": task.split, "of": part}
    if mode == "nll":
        values = [record.nll for record in records if record.nll is not None]
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else None
        half = Z95 * spread / math.sqrt(len(values)) if spread is not None else None
        interval = None if half is None else [mean - half, mean + half]
        return {**result, "metric": "nll", "value": mean, "n": len(values), "interval": interval, "seeds": None}
    interval = wilson(sum(record.correct for record in records), len(records))
    metric = "accuracy_ranked" if mode == "rank" else task.metric
    return {
        **result, "metric": metric, "value": accuracy(records), "n": len(records), "interval": interval, "seeds": None
    }  # fmt: skip


def wilson(correct: int, n: int) -> list[float]:
    """Wilson's 95 % interval of a share."""
    found = binomtest(correct, n).proportion_ci(method="wilson")
    return [float(found.low), float(found.high)]


def macro_average(results: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """
    Mean over the tasks, each with the same weight; None for fewer than two tasks, or different metrics.

    Its interval combines those of the tasks (Newcombe's square-and-add): mean -/+ sqrt(sum (value - bound)^2) / tasks.
    """
    if len(results) < 2 or len({result["metric"] for result in results}) > 1:
        return None
    count = len(results)
    mean = sum(result["value"] for result in results) / count
    interval = None
    if all(result["interval"] is not None for result in results):
        down, up = (
            math.sqrt(sum((result["value"] - result["interval"][side]) ** 2 for result in results)) / count
            for side in (0, 1)
        )
        interval = [mean - down, mean + up]
    splits = {result["split"] for result in results}
    return {
        "task": f"average of {count} tasks", "dataset": ", ".join(result["task"] for result in results),
        "split": splits.pop() if len(splits) == 1 else "mixed", "metric": results[0]["metric"], "value": mean,
        "n": sum(result["n"] for result in results), "interval": interval, "seeds": None,
        "of": sum(result["of"] or result["n"] for result in results) if any(r["of"] for r in results) else None,
    }  # fmt: skip


def add_to_run(folder: Path, results: Sequence[dict[str, Any]]) -> str | None:
    """
    Write results into the record of a finished run and render its card again.

    A figure of the same task, data and metric is replaced, unless it was measured on more items.

    Returns:
        What was written, in words; None where the folder is not that of a run.
    """
    path = folder / RUN_RECORD
    if not path.is_file():
        return None

    def key(result: dict[str, Any]) -> tuple[Any, ...]:
        return result["task"], result["dataset"], result["split"], result["metric"]

    earlier = json.loads(path.read_text(encoding="utf-8")).get("evaluation") or []
    larger = {key(result): result["n"] for result in earlier}
    kept = [result for result in results if result["n"] < larger.get(key(result), 0)]
    new = [result for result in results if result not in kept]
    replaced = {key(result) for result in new}
    evaluation = [*(result for result in earlier if key(result) not in replaced), *new]
    said = "".join(
        f"; {result['task']} keeps its figure on {larger[key(result)]} items, which {result['n']} do not replace"
        for result in kept
    )
    if update_record(folder, evaluation=evaluation):
        return f"{RUN_RECORD} and the model card{said}"
    written = json.loads(path.read_text(encoding="utf-8")).get("evaluation") == evaluation
    return f"{RUN_RECORD}; the model card was edited by hand and is left as it is{said}" if written else None
