"""The echo pass beside the plain path on the same items: paired differences from the records of both."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .evaluate import Task
from .records import read_records
from .results import Z95
from .run import OF_THE_ECHO


def differences(folder: Path, tasks: Sequence[Task], mode: str) -> list[dict[str, Any]]:
    """
    Echo minus plain, item by item, from finished records.

    Returns:
        For every task the share of right items ("exact_match" in mode "nll": what greedy generation would write) and,
        where it was scored, "nll" in nats per answer; each with both values, their difference, its 95 % interval over
        items, and n.
    """
    found = []
    for task in tasks:
        plain, echo = (read_records(folder / f"{task.name}.{label}.jsonl")[1] for label in (mode, mode + OF_THE_ECHO))
        pairs = [(echo[index], plain[index]) for index in sorted(plain) if index in echo]
        right = {"nll": "exact_match", "rank": "accuracy_ranked"}.get(mode, task.metric)
        values = {right: [(float(one.correct), float(other.correct)) for one, other in pairs]}
        scored = [(one.nll, other.nll) for one, other in pairs if one.nll is not None and other.nll is not None]
        values |= {"nll": scored} if scored else {}
        found += [{"task": task.name, "metric": metric, **_paired(each)} for metric, each in values.items()]
    return found


def _paired(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Means of both and of their difference, with a 95 % interval; None for a single pair."""
    echo, plain = np.array(pairs, dtype=float).T
    gain, interval = float((echo - plain).mean()), None
    if len(pairs) > 1:
        half = Z95 * float((echo - plain).std(ddof=1)) / math.sqrt(len(pairs))
        interval = [gain - half, gain + half]
    return {
        "plain": float(plain.mean()), "echo": float(echo.mean()), "difference": gain, "interval": interval,
        "n": len(pairs),
    }  # fmt: skip
