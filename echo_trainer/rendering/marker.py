"""Prompt and answer of a text in which a marker stands before each answer, such as "### Response:\n".

Matched on the text, before it is tokenised: how a tokenizer cuts a marker up depends on what stands around it.
"""

from collections.abc import Sequence
from itertools import pairwise

from .forms import RowOptions, row_name

Span = tuple[int, int]


class NoMarkerError(ValueError):
    """A text that does not hold the marker, or nothing after it."""


def marked_spans(text: str, options: RowOptions, ends: Sequence[str], number: int | None = None) -> list[Span]:
    """
    The answers of a text, as (first character, one past the last).

    An answer begins after its marker and ends with the first text that ends answers, before the next prompt marker, or
    with the text. A marker that nothing follows (a prompt that asks at the end) begins no answer.

    Args:
        text: with its end token, as it is trained on.
        options: its markers.
        ends: what ends an answer and belongs to it: the tokenizer's end token, the end of a turn.
        number: of the row, for errors.

    Raises:
        NoMarkerError: there is no answer marker, or no answer follows one.
        ValueError: an answer follows, and nothing says where the one before it ends.
    """
    marker = options.answer_marker
    assert marker is not None  # else nobody looks for it
    starts, place = [], text.find(marker)
    while place >= 0:
        starts.append(place + len(marker))
        place = text.find(marker, starts[-1])
    if not starts:
        raise NoMarkerError(
            f"{row_name(number)} does not hold the answer marker {marker!r}, so nothing says where its answer begins: "
            f"{_shown(text)!r}. Correct the marker or the row, or set drop_without_marker=True to leave such rows out."
        )
    spans = []
    for start, following in pairwise([*starts, None]):
        assert start is not None  # the last one has nothing after it
        limit = len(text) if following is None else following - len(marker)
        found = [limit] if following is None else []
        for end in ends:
            if end and (place := text.find(end, start, limit)) >= 0:
                found.append(place + len(end))
        if options.prompt_marker and (place := text.find(options.prompt_marker, start, limit)) >= 0:
            found.append(place)
        if not found:
            raise ValueError(
                f"{row_name(number)} holds the answer marker {marker!r} {len(starts)} times, and nothing says where "
                f"the answer {_shown(text[start:limit])!r} ends and the next prompt begins. Set prompt_marker to what "
                f"stands before every prompt, such as '### Instruction:\\n'."
            )
        spans.append((start, min(found)))
    answers = [span for span in spans if _says(text[slice(*span)], ends)]
    if not answers:
        raise NoMarkerError(
            f"{row_name(number)} holds the answer marker {marker!r}, and no answer follows it: {_shown(text)!r}. "
            f"Write its answer, or set drop_without_marker=True to leave such rows out."
        )
    return answers


def _says(answer: str, ends: Sequence[str]) -> bool:
    """Whether an answer is more than its end."""
    for end in ends:
        answer = answer.removesuffix(end)
    return bool(answer.strip())


def _shown(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."
