"""The advantage of the echo pass: a ratio of sums with an error over samples, on all tokens or those that differ."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from echo_trainer.method.advantage import Loans, advantage, differing_tokens, partners


def gains(lengths, seed=0, shift=0.3, spread=1.0):
    """Gains with a part that all tokens of a sample share."""
    generator = np.random.default_rng(seed)
    sample = np.repeat(np.arange(len(lengths)), lengths)
    shared = generator.normal(shift, spread, len(lengths))[sample]
    return shared + generator.normal(0, 0.2, len(sample)), sample


def test_equal_lengths_are_the_mean_of_samples():
    gain, sample = gains([4] * 9)
    found, means = advantage(gain, sample), gain.reshape(9, 4).mean(axis=1)
    assert found.value == pytest.approx(means.mean())
    assert found.error == pytest.approx(stats.sem(means))
    low, high = stats.t.interval(0.95, 8, loc=means.mean(), scale=stats.sem(means))
    assert found.interval == pytest.approx((low, high))
    assert (found.samples, found.tokens) == (9, 36)


def test_unequal_lengths_written_out():
    gain, sample = gains([1, 5, 2, 7, 3], seed=2)
    found = advantage(gain, sample + 40)  # numbers of samples are names
    total, tokens = 0.0, 0
    for number in range(5):
        total, tokens = total + gain[sample == number].sum(), tokens + (sample == number).sum()
    squares = sum((gain[sample == i].sum() - total / tokens * (sample == i).sum()) ** 2 for i in range(5))
    assert found.value == pytest.approx(total / tokens)
    assert found.error == pytest.approx(math.sqrt(5 / 4 * squares) / tokens)


def test_interval_holds_the_truth():
    """Tokens of a sample go together, so an error over tokens would be far too small; 400 draws of 40 samples."""
    lengths, held = np.random.default_rng(1).integers(1, 12, 40), 0
    for seed in range(400):
        low, high = advantage(*gains(lengths, seed)).interval
        held += low < 0.3 < high
    assert 0.92 < held / 400 < 0.98


def test_what_is_clear():
    assert advantage(np.array([1.0, 1.1, 0.9]), np.arange(3)).clear
    assert not advantage(np.array([1.0, -1.1, 0.9]), np.arange(3)).clear
    assert not advantage(np.array([-1.0, -1.1, -0.9]), np.arange(3)).clear
    assert not advantage(np.zeros(5), np.arange(5)).clear  # a silent echo: no error and no gain
    assert not advantage(np.ones(4), np.zeros(4, int)).clear  # one sample tells nothing about the next
    assert advantage(np.zeros(0), np.zeros(0, int)) is None


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["the answer is A .", "the answer is B ."], [3, 3]),
        (["A B", "C D"], [0, 1, 0, 1]),
        (["yes .", "no .", "no way ."], [0, 0, 0, 1]),
        (["x x x", "x x"], [2]),  # what both begin with is taken first
        (["same .", "same ."], []),
        (["alone ."], []),
        (["a a b", "a b"], [1]),
    ],
)
def test_tokens_in_which_answers_differ(answers, expected):
    words = {word: i for i, word in enumerate(sorted(set(" ".join(answers).split())))}
    labels = np.array([words[word] for answer in answers for word in answer.split()])
    sample = np.repeat(np.arange(len(answers)), [len(answer.split()) for answer in answers])
    place = np.concatenate([np.arange(len(answer.split())) for answer in answers])
    assert place[differing_tokens(labels, sample)].tolist() == expected


@pytest.mark.parametrize(
    ("documents", "lent", "expected"),
    [
        ([0, 1, 2], False, [1, 2, 0]),
        ([0, 1, 2], True, [1, 2, 0]),  # who is not alone needs no one of another batch
        ([3, 3, 5, 8, 8, 8], False, [2, 2, 3, 0, 1, 1]),  # turns: the same place, or the last there is
        ([4], False, [0]),
        ([4, 4], False, [0, 1]),
        ([4, 4], True, [2, 2]),
        ([], True, []),
    ],
)
def test_whose_echo_is_borrowed(documents, lent, expected):
    assert partners(np.array(documents, dtype=int), lent=lent).tolist() == expected


@pytest.mark.parametrize(
    ("documents", "prompts", "expected"),
    [
        ([0, 1, 2], None, [1, 2, 0]),
        ([0, 1, 2], "abb", [1, 0, 0]),  # not the one with the same prompt beside it
        ([0, 1, 2, 3], "abca", [1, 2, 3, 1]),  # nor the one behind the end
        ([2, 2, 2, 5, 7, 7], "aab", [4, 5, 5, 4, 0, 1]),  # segments of a document, the last where it has fewer
        ([3, 3, 4], "aa", [3, 3, 3]),  # nobody here: lent
        ([4], "a", [1]),
        ([], "", []),
    ],
)
def test_the_echo_of_the_same_prompt_is_not_borrowed(documents, prompts, expected):
    given = np.array(documents, int)
    assert partners(given, lent=True, prompts=prompts).tolist() == expected
    alone = [place if other == len(given) else other for place, other in enumerate(expected)]
    assert partners(given, lent=False, prompts=prompts).tolist() == alone


def test_a_prompt_borrows_the_last_echo_of_another_one():
    loans, echoes = Loans(), torch.arange(4.0)
    assert loans.to("a") is None
    for prompt, echo in zip("abba", echoes, strict=True):
        loans.keep(prompt, echo)
    assert loans.to("c") == echoes[3] == loans.to("b")
    assert loans.to("a") == echoes[2]  # and not its own, though that is the last
