"""Stochastic routing: which samples get an echo pass at which step (docs/method.md, step 6).

    r_i ~ Bernoulli(p_k),   p_k = p_start + k / (K - 1) * (p_end - p_start)

A draw is a pure function of (seed, global position of the sample, document inside the sample), computed with a
counter-based generator (Philox, Salmon et al. 2011; numpy's numbers). It keeps no state, so workers, accumulation,
ranks and resumes cannot change it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt64

Numbers = int | np.integer | np.ndarray


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

    def position(self, step: int, micro_batch: int, row: Numbers) -> Any:
        """Global position of a sample in the run: ((k * GA + i) * world + rank) * B + row."""
        batch = (step * self.accumulation + micro_batch) * self.world_size + self.rank
        return batch * self.batch_size + row

    def draw(self, step: int, micro_batch: int, row: Numbers, document: Numbers = 0) -> Any:
        """Whether document `document` of the sample in `row` gets an echo pass, r_i; arrays give arrays."""
        return uniform(self.seed, self.position(step, micro_batch, row), document) < self.probability(step)


def uniform(seed: int, position: Numbers, document: Numbers = 0) -> Any:
    """
    Numbers in [0, 1) that depend on the arguments and on nothing else (53 random bits).

    The first output of `numpy.random.Philox(key=[seed, 0], counter=[position, document, 0, 0])`, which counts once
    before it draws. Making a generator takes longer than drawing from it, and a packed batch holds a thousand
    documents; so the rounds are computed here, for all of them at once.
    """
    position, document = np.broadcast_arrays(np.asarray(position, np.uint64), np.asarray(document, np.uint64))
    zeros = np.zeros(position.size, np.uint64)
    words = _philox(position.reshape(-1) + np.uint64(1), document.reshape(-1), zeros, zeros, seed % 2**64)
    return ((words >> np.uint64(11)) * 2.0**-53).reshape(position.shape)[()]


_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_INCREMENTS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_ROUNDS = 10

Words = UInt64[np.ndarray, "n"]


def _philox(a: Words, b: Words, c: Words, d: Words, seed: int) -> Words:
    """First word of Philox4x64 for the counters (a, b, c, d) and the key (seed, 0)."""
    keys = (seed, 0)
    for _ in range(_ROUNDS):
        high, low = _multiply(a, _MULTIPLIERS[0])
        other_high, other_low = _multiply(c, _MULTIPLIERS[1])
        a, b, c, d = other_high ^ b ^ np.uint64(keys[0]), other_low, high ^ d ^ np.uint64(keys[1]), low
        keys = tuple((key + increment) % 2**64 for key, increment in zip(keys, _INCREMENTS, strict=True))
    return a


def _multiply(x: Words, y: int) -> tuple[Words, Words]:
    """High and low word of the product of 64-bit numbers, by halves."""
    half, mask = np.uint64(32), np.uint64(2**32 - 1)
    x_high, x_low, y_high, y_low = x >> half, x & mask, np.uint64(y >> 32), np.uint64(y % 2**32)
    middle = x_high * y_low + (x_low * y_low >> half)
    other = x_low * y_high + (middle & mask)
    return x_high * y_high + (middle >> half) + (other >> half), x * np.uint64(y)
