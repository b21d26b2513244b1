"""Of several answers to a prompt the one that was given most often."""

from collections.abc import Sequence
from dataclasses import dataclass

EMPTY, UNFINISHED = "empty", "unfinished"


@dataclass(frozen=True)
class Written:
    """
    An answer as a teacher wrote it.

    Attributes:
        text: without special tokens.
        finished: whether it ends with an end token.
    """

    text: str
    finished: bool

    @property
    def fault(self) -> str | None:
        """Why nobody should learn it, None where there is no reason."""
        if not self.finished:
            return UNFINISHED
        return None if self.text.strip() else EMPTY


def vote(answers: Sequence[Written]) -> tuple[Written, int]:
    """
    The answer to take, and how many of the answers are the same, white space at the ends aside.

    Answers that are empty or cut off have no vote. Of equals the first counts. Where no answer is any good, the first
    and 0.
    """
    votes: dict[str, list[Written]] = {}
    for answer in answers:
        if answer.fault is None:
            votes.setdefault(answer.text.strip(), []).append(answer)
    if not votes:
        return answers[0], 0
    winners = max(votes.values(), key=len)  # the first of the longest
    return winners[0], len(winners)
