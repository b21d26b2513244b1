"""What reads and writes in an evaluation: the model as it is deployed, or something else in its place."""

from collections.abc import Sequence
from typing import Any, Protocol

from .generation import greedy_answers
from .scoring import Score, TokenizedRow, score_rows


class Reader(Protocol):
    """Scores rows of tokens and writes answers."""

    def score(self, rows: Sequence[TokenizedRow]) -> list[list[Score]]:
        """Scores of every completion of every row; one batch."""
        ...

    def answers(self, prompts: list[str], **options: Any) -> list[str]:
        """What is written after each prompt; options as for `generation.greedy_answers`."""
        ...


class PlainReader:
    """A model, or a model with its adapter."""

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer

    def score(self, rows: Sequence[TokenizedRow]) -> list[list[Score]]:
        """See `Reader`."""
        return score_rows(self.model, self.tokenizer, rows)

    def answers(self, prompts: list[str], **options: Any) -> list[str]:
        """See `Reader`."""
        return greedy_answers(self.model, self.tokenizer, prompts, **options)
