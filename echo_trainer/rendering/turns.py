"""The assistant's turns in a rendered conversation whose chat template does not mark them.

The conversation is rendered up to each turn, with the words that ask for an answer, and up to its end. Each of these
texts must be the beginning of the whole one; then the turn is what lies between. A template that writes a turn
differently once it is followed by others (reasoning that is dropped later) is refused, with both texts.
"""

from collections.abc import Callable, Sequence
from typing import Any

from .forms import row_name
from .marker import Span

Render = Callable[[Sequence[dict[str, Any]], bool], str]
"""Text of messages, and whether the words that ask for an answer follow."""


def turn_spans(
    messages: Sequence[dict[str, Any]], render: Render, tokens: Sequence[str] = (), number: int | None = None
) -> tuple[str, list[Span]]:
    """
    The text of a conversation, and the assistant's turns in it.

    Args:
        messages: with `role` and `content`.
        render: writes messages as text.
        tokens: texts of the special tokens; a template may close a conversation with one.
        number: of the row, for errors.

    Raises:
        ValueError: no turn of the assistant, or the template writes the beginning of the conversation differently
            once it goes on.
    """
    whole = render(messages, False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = _begin(messages, i, render, whole, number)
        end = _end(messages, i, render, whole, tokens, number)
        # A space after the turn often is a part of the next turn's first token.
        end = start + len(whole[start:end].rstrip(" "))
        if end <= start:
            raise ValueError(
                f"{row_name(number)}: its turn {i} of the assistant is empty in the chat template's text."
            )
        spans.append((start, end))
    if not spans:
        raise no_answer(messages, number)
    return whole, spans


def no_answer(messages: Sequence[dict[str, Any]], number: int | None = None) -> ValueError:
    """What is said of a conversation without a turn of the assistant."""
    return ValueError(
        f"{row_name(number)} has no turn of the assistant, so no answer: its roles are "
        f"{', '.join(str(message['role']) for message in messages)}. Drop such rows."
    )


def _begin(messages: Sequence[dict[str, Any]], i: int, render: Render, whole: str, number: int | None) -> int:
    """Where turn i begins: after the words that ask for it."""
    if i == 0:  # nothing to render before it
        content = messages[0]["content"]
        place = whole.find(content.strip()) if isinstance(content, str) else -1
        if place < 0:
            raise ValueError(f"{row_name(number)} begins with the assistant, and the chat template hides its words.")
        return place
    text = render(messages[:i], True)
    if not whole.startswith(text):
        raise _differs(messages, i, text, whole, number)
    return len(text)


def _end(
    messages: Sequence[dict[str, Any]], i: int, render: Render, whole: str, tokens: Sequence[str], number: int | None
) -> int:
    """Where turn i ends."""
    text = render(messages[: i + 1], False)
    if whole.startswith(text):
        return len(text)
    # Some templates close every conversation with a token, which stands where the next turn begins.
    for closing in tokens:
        body = text.removesuffix(closing)
        if body != text and whole.endswith(closing) and whole.startswith(body):
            return len(body)
    raise _differs(messages, i + 1, text, whole, number)


def _differs(messages: Sequence[dict[str, Any]], n: int, text: str, whole: str, number: int | None) -> ValueError:
    at = _common(text, whole)
    around = slice(max(0, at - 80), at + 120)
    return ValueError(
        f"{row_name(number)}: the chat template writes the first {n} of its {len(messages)} messages differently once "
        f"others follow, so where the assistant's turns are cannot be told. Alone they end in\n{text[around]!r}\nand "
        f"in the whole conversation the same place reads\n{whole[around]!r}\nGive the tokenizer a chat template that "
        f"marks the assistant's turns with {{% generation %}} and {{% endgeneration %}} (chat_template_path), or rows "
        f"with `prompt` and `completion`, one turn each."
    )


def _common(text: str, other: str) -> int:
    """Number of characters with which both begin."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((place for place, (one, two) in pairs if one != two), min(len(text), len(other)))
