"""From the states of the source layers to the echo z: one line of the table for each value of `echo_aggregation`.

Shapes: S source layers, G segments, d hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

States = Float[Tensor, "S G d"]
Echo = Float[Tensor, "G d"]


@dataclass(frozen=True)
class Aggregation:
    """
    A way to combine the source layers.

    Attributes:
        says: what it is, for the help of `echo_aggregation`.
        combine: z (G, d) from the states (S, G, d) and what is learned; it is differentiable in both.
        start: start values of what is learned, from S and d; None where nothing is.
    """

    says: str
    combine: Callable[[States, Any], Echo]
    start: Callable[[int, int], Tensor] | None = None


def mean(states_SGd: States, learned: None) -> Echo:
    """Every source layer counts alike."""
    return states_SGd.mean(dim=0)


def softmax_mean(states_SGd: States, learned: Float[Tensor, "S"]) -> Echo:
    """A mean with one learned weight for each source layer."""
    return torch.einsum("s,sgd->gd", learned.softmax(dim=0), states_SGd)


AGGREGATIONS = {
    "mean": Aggregation("every source layer counts alike", mean),
    "weighted": Aggregation(
        "a learned softmax over the source layers, which starts as the mean",
        softmax_mean,
        start=lambda n_sources, hidden_size: torch.zeros(n_sources),
    ),
}
