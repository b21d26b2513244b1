"""Rewards by rank, as numbers."""

import json
import math
from functools import partial

import beam_reference
import numpy as np
import pytest
import torch

from echo_trainer import BeamGRPOConfig
from echo_trainer.bgrpo.rewards import DECAY_OF_PAPER, group_rewards, make_reward, rank, reverse_rank, simple
from echo_trainer.bgrpo.scoring import BeamReward


@pytest.mark.parametrize("i", [0, 1, 9])
@pytest.mark.parametrize("decay", [None, DECAY_OF_PAPER, 2.5])
def test_values(i, decay):
    scale = 10 if decay is None else decay
    assert rank(True, i, 10, decay) == math.exp(-i / scale)
    assert rank(False, i, 10, decay) == -0.1
    assert simple(True, i, 10, decay) == 1
    assert simple(False, i, 10, decay) == -0.1
    assert reverse_rank(True, i, 10, decay) == math.exp(i / scale)
    assert reverse_rank(False, i, 10, decay) == -0.1 * math.exp(-i / scale)


def test_the_papers_code_has_32_for_every_group():
    assert rank(True, 9, 10, DECAY_OF_PAPER) == math.exp(-9 / 32)
    assert make_reward("rank", 32, 0.5)(False, 3, 10) == -0.5


@pytest.mark.parametrize("kind", ["rank", "simple", "reverse_rank"])
@pytest.mark.parametrize("zero_sum", [False, True])
def test_groups_are_those_of_the_loops(kind, zero_sum):
    for rights in ([1, 0, 0, 1], [0, 0, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]):
        made = group_rewards(rights, make_reward(kind), zero_sum)
        assert made == pytest.approx(beam_reference.group(kind, rights, zero_sum), rel=1e-12)


def test_zero_sum_moves_the_negative_ones_only():
    plain, scaled = (group_rewards([1, 0, 0, 1], rank, zero_sum) for zero_sum in (False, True))
    assert sum(scaled) == pytest.approx(0, abs=1e-15)
    assert scaled[0] == plain[0] and scaled[3] == plain[3]
    assert scaled[1] == scaled[2] < plain[1]
    free = make_reward("rank", wrong=0.0)  # nothing to scale
    assert group_rewards([1, 0], free, True) == [1.0, 0.0]


@pytest.mark.parametrize("score", [0, 1, True, 0.25])
def test_a_group_that_agrees_teaches_nothing(score):
    rewards = group_rewards([score] * 7, reverse_rank)
    assert rewards == [float(score)] * 7


def test_scores_between_lie_between():
    assert rank(0.25, 2, 10) == 0.25 * math.exp(-0.2) + 0.75 * -0.1
    assert group_rewards([0.5, 1.0], simple) == [0.5 * 1.0 + 0.5 * -0.1, 1.0]


def test_own_reward_gets_right_rank_and_size():
    seen = []
    group_rewards([1, 0, 1], lambda *given: seen.append(given) or 0.0)
    assert seen == [(1, 0, 3), (0, 1, 3), (1, 2, 3)]


def test_a_batch_is_taken_group_by_group_with_its_columns():
    logged, asked = {}, []

    def verifier(prompt, completion, row):
        asked.append((prompt, completion, row))
        return completion == row["answer"]

    reward = BeamReward(verifier, simple, False, lambda: 2)
    rewards = reward(
        prompts=["p", "p", "q", "q"],
        completions=["a", "b", "b", "b"],
        answer=["a", "a", "b", "b"],
        completion_ids=[[1]] * 4,
        trainer_state=None,
        log_extra=None,
        log_metric=logged.__setitem__,
    )
    assert rewards == [1.0, -0.1, 1.0, 1.0]
    assert asked[1] == ("p", "b", {"answer": "a"})
    assert logged == {"beams/right": 0.75, "beams/first_right": 1.0, "beams/any_right": 1.0, "beams/mixed": 0.5}


@pytest.mark.parametrize(
    ("said", "error"),
    [(None, TypeError), ("yes", TypeError), (torch.ones(2), TypeError), (2, ValueError), (math.nan, ValueError)],
)
def test_a_verifier_that_says_something_else_is_named(said, error):
    reward = BeamReward(lambda *_: said, simple, False, lambda: 1)
    with pytest.raises(error, match="verifier returned"):
        reward(prompts=["p"], completions=["c"], log_metric=lambda *_: None)


class Halves:
    def __call__(self, right, rank, size):
        return right / 2


def by_half(right, rank, size):
    return right / 2


@pytest.mark.parametrize(
    ("own", "name"), [(by_half, "by_half"), (Halves(), "Halves"), (partial(rank, decay=2.0), "partial")]
)
def test_own_reward_is_logged_by_its_name(tmp_path, own, name):
    """TensorBoard and others log the options as JSON."""
    config = BeamGRPOConfig(str(tmp_path), use_cpu=True, beam_reward=own)
    assert json.loads(config.to_json_string())["beam_reward"] == config.to_sanitized_dict()["beam_reward"] == name


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (None, TypeError), (np.array([1.0, 2.0]), TypeError), (torch.ones(2), TypeError), ("much", TypeError),
        (math.nan, ValueError), (math.inf, ValueError), (torch.tensor(-math.inf), ValueError),
    ],
)  # fmt: skip
def test_a_reward_that_is_no_number_is_named(said, error):
    reward = BeamReward(lambda prompt, completion, row: completion == "c", lambda *_: said, False, lambda: 2)
    with pytest.raises(error, match=r"beam_reward returned .* for \(right 1.0, rank 0, group size 2\)") as caught:
        reward(prompts=["p", "p"], completions=["c", "d"], log_metric=lambda *_: None)
    assert caught.value.__notes__ == ["The beams are those of the prompt 'p', with the scores [1.0, 0.0]."]


@pytest.mark.parametrize("said", [np.float32(0.5), torch.tensor(0.5), True])
def test_rewards_of_other_kinds_become_numbers(said):
    rewards = group_rewards([1, 0], lambda *_: said)
    assert rewards == [float(said)] * 2 and {type(reward) for reward in rewards} == {float}


@pytest.mark.parametrize("broken", [lambda *_: 1 / 0, lambda prompt, completion, row: row["answer"], lambda one: one])
def test_the_row_of_a_verifier_that_raises_is_named(broken):
    reward = BeamReward(broken, simple, False, lambda: 1)
    with pytest.raises((ZeroDivisionError, KeyError, TypeError)) as caught:
        reward(prompts=["p"], completions=["c"], number=[3], log_metric=lambda *_: None)
    assert caught.value.__notes__ == ["The verifier raised this for prompt 'p', completion 'c' and row {'number': 3}."]


@pytest.mark.parametrize("broken", [lambda *_: 1 / 0, lambda right, rank: right])
def test_the_beam_of_a_reward_that_raises_is_named(broken):
    with pytest.raises((ZeroDivisionError, TypeError)) as caught:
        group_rewards([0, 1], broken)
    assert caught.value.__notes__ == ["beam_reward raised this for (right 0, rank 0, group size 2)."]
