"""Which rows run together: rows of like length, so that little is padding. Host side, pure functions of lengths.

Shapes: R rows, each of A_r tokens that are run after P_r prefix tokens; C classes of rows of like A and P; K groups.

Every row of a group is as long as the longest of it. What a group costs, in tokens run through the linear maps of a
layer:

    PASS + n A (1 + KAPPA (P + A)) + RHO n P        A, P the largest of its n rows

PASS is what a pass costs whatever it runs (its kernels are launched and the weights read anew), KAPPA is attention of
one token to one key, RHO a prefix key and value put in its place. The figures are those of a 7B model (hidden size
4096) on an accelerator; nothing but the price of padding depends on them.

Dynamic programming over the classes sorted by A, then P, finds the groups of least cost: best(k, j) = min over i < j
of best(k - 1, i) + cost(classes i .. j).
"""

import math

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

PASS = 512
"""Tokens that could be run in the time that one more pass takes."""
KAPPA = 1 / 16384
"""A token's attention to one key, forward and backward, beside its linear maps."""
RHO = 1 / 64
"""Putting the key and value of one prefix token in place, likewise."""
MOST = 16
"""Groups at most."""
MOST_CLASSES = 256
"""Classes at most: the work grows with their square."""


def group_cost(n: Real[Tensor, "..."], run: Real[Tensor, "..."], prefix: Real[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Cost of groups of n rows, padded to `run` tokens after `prefix` ones; any shapes that broadcast."""
    return PASS + n * (run * (1 + KAPPA * (prefix + run)) + RHO * prefix)


def group_rows(
    run_R: Int[Tensor, "R"], prefix_R: Int[Tensor, "R"], n_groups: int | None = None
) -> list[Int[Tensor, "_"]]:
    """
    Split rows into the groups of least cost.

    Args:
        run_R, prefix_R: int64 (R,), A_r >= 1 and P_r.
        n_groups: as many groups, fewer only where the rows do not tell so many apart; None for the cheapest number,
            at most `MOST`.

    Returns:
        The rows of each group, increasing, int64; the groups by growing A.
    """
    class_R = _classes(run_R, prefix_R)
    n_classes = int(class_R.max()) + 1
    count_C = torch.bincount(class_R)
    run_C, prefix_C = (
        torch.zeros(n_classes, dtype=torch.int64).scatter_reduce_(0, class_R, length_R, "amax").double()
        for length_R in (run_R, prefix_R)
    )
    most = min(n_classes, MOST if n_groups is None else n_groups)
    end_K = _cuts(count_C.double(), run_C, prefix_C, most, exactly=n_groups is not None)
    group_R = torch.bucketize(torch.arange(n_classes), end_K, right=True)[class_R]
    return list(torch.argsort(group_R, stable=True).split(torch.bincount(group_R).tolist()))


def _classes(run_R: Int[Tensor, "R"], prefix_R: Int[Tensor, "R"]) -> Int[Tensor, "R"]:
    """The class of each row, (R,): of like A within a few per cent, and of like P within a factor of four."""
    prefix_class_R = (prefix_R.clamp(min=1).double().log() / math.log(4)).long()
    for step in (1.03, 1.06, 1.12, 1.25):
        # Lengths that a class would round to less than one token apart are classes of their own.
        exact = math.ceil(1 / (step - 1))
        rounded_R = exact + (run_R / exact).clamp(min=1).double().log().div(math.log(step)).ceil().long()
        run_class_R = torch.where(run_R.le(exact), run_R, rounded_R)
        _, class_R = torch.unique(run_class_R * 64 + prefix_class_R, return_inverse=True)
        if int(class_R.max()) < MOST_CLASSES:
            break
    return class_R


def _cuts(
    count_C: Float[Tensor, "C"], run_C: Float[Tensor, "C"], prefix_C: Float[Tensor, "C"], most: int, exactly: bool
) -> Int[Tensor, "cuts"]:
    """The class after the last one of each group but the last, (K - 1,), for at most (or exactly) `most` groups."""
    n_classes = len(count_C)
    before_C = count_C.cumsum(0) - count_C
    # cost_CC[i, j]: classes i .. j in one group.
    n_CC = before_C + count_C - before_C[:, None]
    run_CC, prefix_CC = (x_C.expand(n_classes, -1).triu().cummax(1).values for x_C in (run_C, prefix_C))
    cost_CC = group_cost(n_CC, run_CC, prefix_CC).masked_fill(n_CC.le(0), math.inf)
    best_C, starts, totals = cost_CC[0], [], [cost_CC[0, -1]]
    for _ in range(most - 1):
        # The last group begins at class i + 1, the others cover what lies before.
        best_C, at_C = (cost_CC[1:] + best_C[:-1, None]).min(0)
        starts.append(at_C + 1)
        totals.append(best_C[-1])
    k = most - 1 if exactly else int(torch.stack(totals).argmin())
    ends: list[int] = []
    for start_C in reversed(starts[:k]):
        ends.insert(0, int(start_C[ends[0] - 1 if ends else -1]))
    return torch.tensor(ends, dtype=torch.int64)
