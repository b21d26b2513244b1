"""Stochastic routing: which samples get an echo pass at which step (docs/method.md, step 6).

    r_i ~ Bernoulli(p_k),   p_k = p_start + k / (K - 1) * (p_end - p_start)

A draw is a pure function of (seed, global position of the sample, document inside the sample), computed with a
counter-based generator (Philox, Salmon et al. 2011, as implemented by numpy). It keeps no state, so workers,
accumulation, ranks and resumes cannot change it.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RoutingSchedule:
    """
    What turns (step, micro-batch, row) into a routing decision.

    Args:
        seed: seed of the routing.
        p_start, p_end: probability at the first and at the last optimizer step.
        total_steps: K, number of optimizer steps of the run.
        accumulation: micro-batches per optimizer step and process.
        world_size, rank: number of data-parallel processes and the index of this one.
        batch_size: rows of one micro-batch.
    """

    seed: int
    p_start: float
    p_end: float
    total_steps: int
    accumulation: int = 1
    world_size: int = 1
    rank: int = 0
    batch_size: int = 1

    def probability(self, step: int) -> float:
        """p_k for optimizer step k, counted from 0."""
        if self.total_steps <= 1:
            return self.p_start
        progress = min(max(step / (self.total_steps - 1), 0.0), 1.0)
        return self.p_start + progress * (self.p_end - self.p_start)

    def position(self, step: int, micro_batch: int, row: int) -> int:
        """Global position of a sample in the run: ((k * GA + i) * world + rank) * B + row."""
        batch = (step * self.accumulation + micro_batch) * self.world_size + self.rank
        return batch * self.batch_size + row

    def draw(self, step: int, micro_batch: int, row: int, document: int = 0) -> bool:
        """Whether document `document` of the sample in `row` gets an echo pass, r_i."""
        return uniform(self.seed, self.position(step, micro_batch, row), document) < self.probability(step)


def uniform(seed: int, position: int, document: int = 0) -> float:
    """A number in [0, 1) that depends on the arguments and on nothing else (53 random bits)."""
    generator = np.random.Philox(key=np.array([seed % 2**64, 0], np.uint64), counter=[position, document, 0, 0])
    return int(generator.random_raw() >> np.uint64(11)) * 2.0**-53
