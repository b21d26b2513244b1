"""Paired differences between two arms, with intervals over seeds and items.

Shapes: S seeds, I items of a task; d (S, I) the difference of an item's score between two arms of the same seed.

The same items are scored for every seed, so the two factors are crossed:

    d_si = delta + a_s + b_i + e_si

and the mean difference has the variance  var(a)/S + var(b)/I + var(e)/(SI),  estimated without bias by
v = v_S + v_I - v_E  with  v_S = var(row means)/S,  v_I = var(column means)/I,  v_E = residual mean square/(SI)
(v_S and v_I both hold a var(e)/(SI)). The interval is  mean +- t * sqrt(v)  with Satterthwaite's degrees of freedom.

With few seeds this matters: a percentile bootstrap over 5 seeds is too short (its quantiles come from 5 values and it
knows no t), an interval over items alone takes the luck of a seed for an effect. Coverage is tested on simulated data
(`tests/ablation/test_ablation_statistics.py`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student_t

LEVEL, POWER = 0.95, 0.80
_FLOOR = 0.25


@dataclass(frozen=True)
class Comparison:
    """
    A paired difference of two arms.

    Attributes:
        difference: mean over tasks of the mean over seeds and items.
        low, high: 95 % interval over seeds and items; NaN with one seed.
        p: two-sided p-value of "no difference"; NaN with one seed.
        standard_error, df: of `difference`.
        detectable: smallest true difference that would be found with 80 % probability at the 5 % level.
        by_seed: the difference of each seed.
        n_seeds, n_items: S, and the items of all tasks.
    """

    difference: float
    low: float
    high: float
    p: float
    standard_error: float
    df: float
    detectable: float
    by_seed: tuple[float, ...]
    n_seeds: int
    n_items: int


def compare(differences_SI: Sequence[np.ndarray]) -> Comparison:
    """
    The mean difference over tasks, every task with the same weight (one task: that task's).

    Args:
        differences_SI: d of every task; the tasks share their seeds.

    Raises:
        ValueError: no tasks, an empty one, or unequal numbers of seeds.
    """
    tasks = [np.asarray(d, float) for d in differences_SI]
    if not tasks or any(d.ndim != 2 or not d.size for d in tasks) or len({len(d) for d in tasks}) != 1:
        raise ValueError(
            f"Differences of tasks must be (seeds, items) with equal numbers of seeds; got "
            f"{[np.shape(d) for d in differences_SI]}."
        )
    by_seed_S = np.mean([d.mean(axis=1) for d in tasks], axis=0)
    mean, seeds = float(by_seed_S.mean()), len(by_seed_S)
    items = sum(d.shape[1] for d in tasks)
    variance, df = variance_of_mean(tasks)
    error = math.sqrt(variance)
    if math.isnan(error):
        low = high = p = detectable = math.nan
    else:
        half = float(student_t.ppf(0.5 + LEVEL / 2, df)) * error
        low, high = mean - half, mean + half
        p = 2 * float(student_t.cdf(-abs(mean) / error, df)) if error else float(mean == 0)
        detectable = half + float(student_t.ppf(POWER, df)) * error
    return Comparison(mean, low, high, p, error, df, detectable, tuple(by_seed_S.tolist()), seeds, items)


def variance_of_mean(tasks: Sequence[np.ndarray]) -> tuple[float, float]:
    """
    Estimated variance of the mean difference over seeds and items, and Satterthwaite's degrees of freedom.

    Tasks have their own items and share their seeds: item and residual parts are summed over tasks, the seed part is
    that of the seeds' macro means, so what a seed does to all tasks alike is in it. NaN with one seed.
    """
    seeds, n = len(tasks[0]), len(tasks)
    if seeds < 2:
        return math.nan, math.nan
    macro_S = np.mean([d.mean(axis=1) for d in tasks], axis=0)
    parts = [(macro_S.var(ddof=1) / seeds, seeds - 1)]
    residual = 0.0
    for d in tasks:
        row_S, column_I, items = d.mean(axis=1), d.mean(axis=0), d.shape[1]
        if items < 2:
            continue  # one item: its part cannot be told from the seeds'
        parts.append((column_I.var(ddof=1) / items / n**2, items - 1))
        rest_SI = d - row_S[:, None] - column_I + d.mean()
        free = (seeds - 1) * (items - 1)
        part = (rest_SI**2).sum() / free / (seeds * items) / n**2
        parts.append((-part, free))
        residual += part
    # An estimate by subtraction can come out near zero or below it. A quarter of the residual's share is its floor,
    # the seeds' degrees of freedom are that of df: coverage stays between 0.935 and 0.965 in simulation.
    variance = max(sum(part for part, _ in parts), _FLOOR * residual)
    spread = sum(part**2 / free for part, free in parts)
    return float(variance), float(max(seeds - 1, variance**2 / spread)) if spread else float(seeds - 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """
    p-values corrected for their number (Holm 1979).

    Where there is no difference at all, the chance that any of them is below alpha is at most alpha. NaN stays NaN and
    does not count.
    """
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    corrected, least = [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * p_values[i]))
        corrected[i] = least
    return corrected
