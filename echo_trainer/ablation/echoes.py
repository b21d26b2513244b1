"""Echo networks that see something other than the sample's own echo: the controls of the ablation.

Shapes: S source layers, G routed segments of a micro-batch, d hidden size.

What a control draws depends on (seed, optimizer step, micro-batch) and on nothing else: a resumed run draws the same.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..method.network import EchoNetworks


class ControlledNetworks(EchoNetworks):
    """
    Echo networks with `alter` between aggregation and projection.

    Attributes:
        place: optimizer step and micro-batch; set before every micro-batch.
        prompt_G: number of the prompt that each segment belongs to, those of a prompt in turn; None: each has its own.
    """

    prompt_G: np.ndarray | None = None

    def __init__(self, *args: Any, seed: int, **kwargs: Any):
        super().__init__(*args, seed=seed, **kwargs)
        self.seed = seed
        self.place: tuple[int, int] = (0, 0)

    def aggregate(self, states_SGd: Tensor) -> Tensor:
        """z (G, d) that the networks are given."""
        return self.alter(super().aggregate(states_SGd))

    def alter(self, z_Gd: Tensor) -> Tensor:
        """What stands in for z."""
        raise NotImplementedError

    def generator(self) -> np.random.Generator:
        """Numbers of this micro-batch."""
        step, micro_batch = self.place
        key = np.array([self.seed % 2**64, 1], np.uint64)  # routing uses the second word 0
        return np.random.Generator(np.random.Philox(key=key, counter=[0, micro_batch, step, 0]))


class ZeroNetworks(ControlledNetworks):
    """z = 0. LN(0) = 0 and tanh(0) = 0, so e = 0 and delta = 0 exactly."""

    def alter(self, z_Gd: Tensor) -> Tensor:
        """Zeros."""
        return torch.zeros_like(z_Gd)


class ShuffledNetworks(ControlledNetworks):
    """
    z of another routed segment of the micro-batch.

    A segment that is routed alone has nobody to trade with; it gets z = 0, hence no injection: in no case does an
    answer see its own echo. Answers to one prompt get the same.
    """

    def alter(self, z_Gd: Tensor) -> Tensor:
        """z in an order in which no prompt keeps its place."""
        whose_G = np.arange(len(z_Gd)) if self.prompt_G is None else self.prompt_G
        counts = np.unique(whose_G, return_counts=True)[1]
        if len(counts) == 1:
            return torch.zeros_like(z_Gd)
        first = np.cumsum([0, *counts[:-1]])
        order = np.repeat(first[one_cycle(len(counts), self.generator())], counts)
        return z_Gd.index_select(0, torch.from_numpy(order).to(z_Gd.device))


class NoiseNetworks(ControlledNetworks):
    """A random direction with the norm of each z."""

    def alter(self, z_Gd: Tensor) -> Tensor:
        """Normal numbers, scaled to |z| segment by segment."""
        z_Gd = z_Gd.detach()
        noise = torch.from_numpy(self.generator().standard_normal(tuple(z_Gd.shape))).to(z_Gd)
        return noise * (z_Gd.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True))


NETWORKS: dict[str, type[EchoNetworks]] = {
    "own": EchoNetworks,
    "zero": ZeroNetworks,
    "shuffled": ShuffledNetworks,
    "noise": NoiseNetworks,
}


def one_cycle(n: int, generator: np.random.Generator) -> np.ndarray:
    """A random permutation of n >= 2 that is one cycle, so no element keeps its place (Sattolo 1986)."""
    order = np.arange(n)
    for last in range(n - 1, 0, -1):
        other = generator.integers(last)
        order[last], order[other] = order[other], order[last]
    return order
