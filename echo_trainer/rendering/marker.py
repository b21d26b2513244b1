"""Prompt and answer of a text in which a marker stands before each answer, such as "### Response:\n".

Matched on the text, before it is tokenised: how a tokenizer cuts a marker up depends on what stands around it.
"""

from .forms import RowOptions, row_name

Span = tuple[int, int]


class NoMarkerError(ValueError):
    """A text that does not hold the marker."""


def marked_spans(text: str, options: RowOptions, end_token: str | None, number: int | None = None) -> list[Span]:
    """
    The answers of a text, as (first character, one past the last).

    An answer begins after its marker and ends with the first end token, before the next prompt marker, or with the
    text.

    Args:
        text: with its end token, as it is trained on.
        options: its markers.
        end_token: text of the tokenizer's end token.
        number: of the row, for errors.

    Raises:
        NoMarkerError: there is no answer marker.
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
            f"{row_name(number)} does not hold the answer marker {options.answer_marker!r}, so nothing says where its "
            f"answer begins: {_shown(text)!r}. Correct the marker or the row, or set drop_without_marker=True to "
            f"leave such rows out."
        )
    spans = []
    for i, start in enumerate(starts):
        last = i + 1 == len(starts)
        limit = len(text) if last else starts[i + 1] - len(marker)
        ends = [limit] if last else []
        if end_token and (found := text.find(end_token, start, limit)) >= 0:
            ends.append(found + len(end_token))
        if options.prompt_marker and (found := text.find(options.prompt_marker, start, limit)) >= 0:
            ends.append(found)
        if not ends:
            raise ValueError(
                f"{row_name(number)} holds the answer marker {options.answer_marker!r} {len(starts)} times, and "
                f"nothing says where the answer {_shown(text[start:limit])!r} ends and the next prompt begins. Set "
                f"prompt_marker to what stands before every prompt, such as '### Instruction:\\n'."
            )
        spans.append((start, min(ends)))
    return spans


def _shown(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."
