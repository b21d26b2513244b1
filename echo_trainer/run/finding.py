"""What held-out rows say about the echo: does its pass know more, and is it the echo that knows it?"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..method.advantage import Advantage, advantage, differing_tokens


class ScoredBatch(NamedTuple):
    """
    What was found at the positions of a batch that predict an answer token.

    Attributes:
        plain_N, echo_N, other_N: CE_plain, CE_echo, and CE_echo with the echo of another sample, nats, float64 (N,).
        compared_N: whether there was another sample, bool (N,).
        label_N: the token, int64 (N,).
        document_N: the document of the batch that it belongs to, int64 (N,).
    """

    plain_N: np.ndarray
    echo_N: np.ndarray
    other_N: np.ndarray
    compared_N: np.ndarray
    label_N: np.ndarray
    document_N: np.ndarray


@dataclass(frozen=True)
class Finding:
    """
    How both passes predict held-out answers.

    Attributes:
        echo_loss: CE_echo per answer token, nats.
        gain: the advantage over all answer tokens.
        content: the advantage over the tokens in which answers differ; None where that is all of them, or none.
        own: CE_other - CE_echo over the tokens of `telling`, by how much the pass predicts them better with the own
            echo than with that of another sample; None where there was no other.
    """

    echo_loss: float
    gain: Advantage
    content: Advantage | None
    own: Advantage | None

    @property
    def telling(self) -> Advantage:
        """The advantage that says whether the pass knows something: that of the content, where there is other text."""
        return self.content or self.gain

    @property
    def useless(self) -> bool:
        """Whether the pass knows no more, or knows it with any echo: then it is the work of the networks alone."""
        return not (self.telling.clear and self.own is not None and self.own.clear)

    def metrics(self, prefix: str) -> dict[str, float]:
        """The figures by name, for the log."""
        found = {f"{prefix}loss": self.echo_loss}
        for name, value in (("advantage", self.gain), ("advantage_content", self.content), ("own", self.own)):
            if value is not None:
                found |= {f"{prefix}{name}": value.value, f"{prefix}{name}_se": value.error}
        return found


def find(batches: list[ScoredBatch]) -> Finding | None:
    """What all batches say together; None where nothing is predicted."""
    first, samples = 0, []
    for batch in batches:
        samples.append(batch.document_N + first)
        first += int(batch.document_N.max(initial=-1)) + 1
    columns: Any = [np.concatenate(column) for column in zip(*batches, strict=True)]
    whole, sample_N = ScoredBatch(*columns), np.concatenate(samples)
    gain_N = whole.plain_N - whole.echo_N
    gain = advantage(gain_N, sample_N)
    if gain is None:
        return None
    differs_N = differing_tokens(whole.label_N, sample_N)
    content = advantage(gain_N[differs_N], sample_N[differs_N]) if not differs_N.all() else None
    keep_N = whole.compared_N & differs_N if content is not None else whole.compared_N
    own = advantage((whole.other_N - whole.echo_N)[keep_N], sample_N[keep_N])
    return Finding(float(whole.echo_N.mean()), gain, content, own)
