"""Two evaluations of the same items side by side: paired differences from the records of both."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .evaluate import Task
from .records import read_records
from .results import Z95


def differences(
    tasks: Sequence[Task], mode: str, one: tuple[str, Path, str], other: tuple[str, Path, str]
) -> list[dict[str, Any]]:
    """
    One evaluation minus another, item by item, from finished records.

    Args:
        tasks: that both were evaluated on.
        mode: of both.
        one, other: name in the result, folder of the records, and what the files' names say beside the task's.

    Returns:
        For every task the share of right items ("exact_match" in mode "nll": what greedy generation would write) and,
        where it was scored, "nll" in nats per answer; each with both values, their difference, its 95 % interval over
        items, and n.
    """
    found = []
    for task in tasks:
        ours, theirs = (read_records(folder / f"{task.name}.{label}.jsonl")[1] for _, folder, label in (one, other))
        pairs = [(ours[index], theirs[index]) for index in sorted(theirs) if index in ours]
        right = {"nll": "exact_match", "rank": "accuracy_ranked"}.get(mode, task.metric)
        values = {right: [(float(a.correct), float(b.correct)) for a, b in pairs]}
        scored = [(a.nll, b.nll) for a, b in pairs if a.nll is not None and b.nll is not None]
        values |= {"nll": scored} if scored else {}
        names = (one[0], other[0])
        found += [{"task": task.name, "metric": metric, **_paired(each, names)} for metric, each in values.items()]
    return found


def _paired(pairs: Sequence[tuple[float, float]], names: tuple[str, str]) -> dict[str, Any]:
    """Means of both and of their difference, with a 95 % interval; None for one pair, and where no pair differs."""
    one, other = np.array(pairs, dtype=float).T
    gain, interval = float((one - other).mean()), None
    if len(pairs) > 1 and (one != other).any():  # items that all agree say nothing of how much others would vary
        half = Z95 * float((one - other).std(ddof=1)) / math.sqrt(len(pairs))
        interval = [gain - half, gain + half]
    return {
        names[0]: float(one.mean()), names[1]: float(other.mean()), "difference": gain, "interval": interval,
        "n": len(pairs),
    }  # fmt: skip
