"""Rewards by rank: plain functions of (right, rank, G).

G beams of a prompt, rank i = 0 .. G - 1, best first; D the decay (default G; the paper's public code has 32 for every
G); w what a wrong beam costs (0.1). A right beam gets the first term, a wrong one the second:

    rank          exp(-i / D)     -w
    simple        1               -w
    reverse_rank  exp(i / D)      -w exp(-i / D)

`rank` is for right beams that come early; `reverse_rank` for those that come late, and blames early wrong ones most.
A verifier may give a score s in [0, 1] instead of right or wrong: the reward then is s times the first term plus
(1 - s) times the second.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

from .verifier import number_from

DECAY_OF_PAPER = 32.0
WRONG = 0.1

Reward = Callable[[float, int, int], float]
"""(right, rank, G) -> reward."""


def rank(right: float, rank: int, group_size: int, decay: float | None = None, wrong: float = WRONG) -> float:
    """exp(-rank / decay) if right, else -wrong. `decay` None is the group's size."""
    return _between(right, math.exp(-rank / (decay or group_size)), -wrong)


def simple(right: float, rank: int, group_size: int, decay: float | None = None, wrong: float = WRONG) -> float:
    """1 if right, else -wrong, whatever the rank."""
    return _between(right, 1.0, -wrong)


def reverse_rank(right: float, rank: int, group_size: int, decay: float | None = None, wrong: float = WRONG) -> float:
    """exp(rank / decay) if right, else -wrong exp(-rank / decay). `decay` None is the group's size."""
    scale = decay or group_size
    return _between(right, math.exp(rank / scale), -wrong * math.exp(-rank / scale))


REWARDS = {"rank": rank, "simple": simple, "reverse_rank": reverse_rank}


def make_reward(reward: str | Reward, decay: float | None = None, wrong: float = WRONG) -> Reward:
    """The function of (right, rank, G) that a name stands for, or the one that is given."""
    return partial(REWARDS[reward], decay=decay, wrong=wrong) if isinstance(reward, str) else reward


def name_of_reward(reward: str | Reward) -> str:
    """How a reward is called in logs, records and pickles; a callable without a name by its class."""
    return reward if isinstance(reward, str) else getattr(reward, "__name__", type(reward).__name__)


def group_rewards(scores: Sequence[float], reward: Reward, zero_sum: bool = False) -> list[float]:
    """
    Rewards of the beams of one prompt.

    Where all scores are equal there is nothing to prefer: every reward is the score itself, so all advantages are
    zero. A reward by rank alone would otherwise sharpen the order that the model has already.

    Args:
        scores: of the beams, best first: 1 right, 0 wrong.
        reward: of a beam.
        zero_sum: scale the negative rewards of a mixed group so that the group's sum is zero; without a negative
            one, or without a positive one, nothing is scaled.

    Raises:
        TypeError: a reward is no number.
        ValueError: a reward is NaN or infinite.
    """
    if all(score == scores[0] for score in scores):
        return [float(score) for score in scores]
    rewards = [_number(reward, score, i, len(scores)) for i, score in enumerate(scores)]
    gains, losses = sum(r for r in rewards if r > 0), -sum(r for r in rewards if r < 0)
    if not zero_sum or not gains or not losses:
        return rewards
    return [r if r > 0 else r * gains / losses for r in rewards]


def _between(right: float, if_right: float, if_wrong: float) -> float:
    return right * if_right + (1 - right) * if_wrong


def _number(reward: Reward, right: float, rank: int, group_size: int) -> float:
    where = f"(right {right}, rank {rank}, group size {group_size})"
    found = number_from(partial(reward, right, rank, group_size), "beam_reward", where, where, "Return one number.")
    if not math.isfinite(found):
        raise ValueError(
            f"beam_reward returned {found} for {where}, and the advantages of the whole group would be NaN. Return a "
            f"finite number."
        )
    return found
