"""What the echo pass knows that the plain pass does not: CE_plain - CE_echo on answers neither was trained on.

Whether that is the echo's doing is another question: the networks that bring it can learn something that suits every
prompt. So the same is asked of CE_other - CE_echo, where CE_other is that of the pass with the echo of another sample.

Shapes: N positions that predict an answer token, G routed segments. A sample is a document with an answer.

With d_i the sum of CE_plain - CE_echo over the n_i answer tokens of sample i, the advantage is a ratio of sums,
A = sum_i d_i / sum_i n_i, nats per answer token. Tokens of one answer are not independent, so its standard error is
over samples: that of a ratio estimator, sqrt(S / (S - 1) sum_i (d_i - A n_i)^2) / sum_i n_i.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

LEVEL = 0.95


@dataclass(frozen=True)
class Advantage:
    """
    An advantage and how well it is known.

    Attributes:
        value: nats per token; above zero where the echo pass predicts better.
        error: standard error over samples; infinite for a single one.
        samples, tokens: what it was measured on.
    """

    value: float
    error: float
    samples: int
    tokens: int

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval (Student's t over samples)."""
        if not math.isfinite(self.error):
            return -math.inf, math.inf
        half = float(stats.t.ppf((1 + LEVEL) / 2, self.samples - 1)) * self.error
        return self.value - half, self.value + half

    @property
    def clear(self) -> bool:
        """Whether the whole interval lies above zero."""
        return self.interval[0] > 0


def advantage(gain_N: Float[np.ndarray, "N"], sample_N: Int[np.ndarray, "N"]) -> Advantage | None:
    """
    The advantage over some positions; None where there are none.

    Args:
        gain_N: CE_plain - CE_echo at each of them.
        sample_N: number of the sample that each belongs to, any integers.
    """
    if not len(gain_N):
        return None
    _, number_N = np.unique(sample_N, return_inverse=True)
    gain_S = np.bincount(number_N, weights=gain_N)
    tokens_S = np.bincount(number_N)
    value, samples = gain_S.sum() / tokens_S.sum(), len(gain_S)
    error = math.inf
    if samples > 1:
        spread = ((gain_S - value * tokens_S) ** 2).sum() * samples / (samples - 1)
        error = math.sqrt(spread) / tokens_S.sum()
    return Advantage(float(value), float(error), samples, int(tokens_S.sum()))


def differing_tokens(labels_N: Int[np.ndarray, "N"], sample_N: Int[np.ndarray, "N"]) -> Bool[np.ndarray, "N"]:
    """
    Which tokens are not those with which every answer begins or ends, bool (N,).

    "The correct answer is A." has one token that says something; the echo may learn the others alone.

    Args:
        labels_N: the answer tokens, those of a sample one after another.
        sample_N: the sample of each.
    """
    starts = np.flatnonzero(np.diff(sample_N, prepend=np.nan) != 0)
    ends = np.append(starts[1:], len(labels_N))
    answers = [labels_N[start:end] for start, end in zip(starts, ends, strict=True)]
    shortest = min(map(len, answers), default=0)
    first = _in_common(answers, shortest)
    last = _in_common([answer[::-1] for answer in answers], shortest - first)
    keep_N = np.ones(len(labels_N), dtype=bool)
    for start, end in zip(starts, ends, strict=True):
        keep_N[start : start + first] = keep_N[end - last : end] = False
    return keep_N


class Loans:
    """What earlier batches lend to one whose prompts are all alike: the last echo there was of another prompt."""

    def __init__(self) -> None:
        self._kept: list[tuple[Hashable, Tensor]] = []  # of two prompts, the last one last

    def to(self, prompt: Hashable) -> Tensor | None:
        """The last that was kept of another prompt; None where there is none."""
        return next((lent for whose, lent in reversed(self._kept) if whose != prompt), None)

    def keep(self, prompt: Hashable, lent: Tensor) -> None:
        """Keep what the next batches may borrow."""
        self._kept = [*[each for each in self._kept if each[0] != prompt][-1:], (prompt, lent)]


def partners(
    document_G: Int[np.ndarray, "G"], *, lent: bool, prompts: Sequence[Hashable] | None = None
) -> Int[np.ndarray, "G"]:
    """
    Whose echo each segment is given in place of its own, int64 (G,).

    That of the segment in the same place of the next document with another prompt (its last one, if it has fewer);
    the next of the last is the first. Where there is none: G where there is a `lent` segment of another batch, else
    its own.

    Args:
        document_G: the document of each segment, those of a document one after another.
        lent: whether there is one.
        prompts: of the documents, in their order, equal where the prompts are; None where no two are.
    """
    starts = np.flatnonzero(np.diff(document_G, prepend=-1) != 0)
    counts, n = np.diff(starts, append=len(document_G)), len(starts)
    prompts = range(n) if prompts is None else prompts
    parts = [np.arange(0)]
    for mine, (start, count) in enumerate(zip(starts, counts, strict=True)):
        places = np.arange(count)
        around = ((mine + step) % n for step in range(1, n))
        other = next((place for place in around if prompts[place] != prompts[mine]), None)
        if other is not None:
            parts.append(starts[other] + np.minimum(places, counts[other] - 1))
        else:
            parts.append(np.full(count, len(document_G)) if lent else start + places)
    return np.concatenate(parts)


def _in_common(answers: list[Int[np.ndarray, "_"]], most: int) -> int:
    """With how many tokens, `most` at most, all begin alike."""
    for count in range(most):
        if any(answer[count] != answers[0][count] for answer in answers):
            return count
    return most
