"""Token ids and labels of a text whose answers are known as spans of characters."""

from collections.abc import Sequence
from typing import Any

from trl.data_utils import common_prefix_length

from ..method.segments import IGNORE_INDEX
from .marker import Span


def encode(text: str, spans: Sequence[Span], tokenizer: Any, special_tokens: bool = True) -> dict[str, list[int]]:
    """
    `input_ids` and `labels` of a text: a token is an answer's where it holds a character of the answer.

    Args:
        text: tokenised as a whole.
        spans: the answers, in order, as (first character, one past the last).
        tokenizer: a fast one says which characters a token holds; with a slow one an answer begins and ends where
            the tokens of the text up to there leave those of the whole.
        special_tokens: whether the tokenizer adds its special tokens.
    """
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=special_tokens, return_offsets_mapping=True)
        ids, places = encoded["input_ids"], encoded["offset_mapping"]
        answer = [any(begin < end and stop > start for start, end in spans) for begin, stop in places]
    else:
        ids = tokenizer(text, add_special_tokens=special_tokens)["input_ids"]
        answer = [False] * len(ids)

        def tokens(n_characters: int) -> int:
            if n_characters == len(text):
                return len(ids)
            before = tokenizer(text[:n_characters], add_special_tokens=special_tokens)["input_ids"]
            return common_prefix_length(before, ids)

        for start, end in spans:
            first, last = tokens(start), tokens(end)
            answer[first:last] = [True] * (last - first)
    labels = [token if counts else IGNORE_INDEX for token, counts in zip(ids, answer, strict=True)]
    return {"input_ids": list(ids), "labels": labels}
