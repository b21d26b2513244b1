"""The words of a chat template around an answer: what asks for it, and what ends it.

By them the answers of a text are found that was written by the template elsewhere (`apply_chat_template` in a
`formatting_func` or in a map), which is how many datasets and scripts have their rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from jinja2 import TemplateError

ASKED, ANSWERED, ASKED_AGAIN = "Which one?", "This one.", "And now?"


@dataclass(frozen=True)
class Words:
    """
    Attributes:
        marker: what stands before every answer.
        end: what ends an answer, and belongs to it; "" where the last answer ends in other words than those before.
    """

    marker: str
    end: str


def words_of(
    render: Callable[[Sequence[dict[str, Any]], bool], str], special_words: Sequence[str] = ()
) -> Words | None:
    """
    What a chat template writes around an answer; None where that is nothing by which an answer could be found.

    Args:
        render: writes messages as text; the flag adds the words that ask for an answer.
        special_words: texts of the special tokens, of which none is cut.
    """
    user = {"role": "user", "content": ASKED}
    answer = {"role": "assistant", "content": ANSWERED}
    try:
        alone, asking = render([user], False), render([user], True)
        last = render([user, answer], False)
        whole = render([user, answer, {"role": "user", "content": ASKED_AGAIN}], False)
    except TemplateError:  # one for conversations of another kind
        return None
    before, said, after = whole.partition(ANSWERED)
    if not said or ASKED not in before or ASKED_AGAIN not in after:
        return None
    alone, asking, between = (text.rpartition(ASKED)[2] for text in (alone, asking, before))
    # A template may put words of its own (an empty thought) into the answer, or into the question for it.
    marker = _whole_words(commonprefix([asking, between]), between, special_words)  # noqa: RUF071 (by character)
    if alone != marker:  # else an answer follows the prompt's own end, as in Mistral's
        marker = marker.removeprefix(alone)
    ends = last.rpartition(ANSWERED)[2].strip()
    if not after.startswith(ends):
        ends = next((word for word in special_words if after.startswith(word) and ends.startswith(word)), "")
    return Words(marker, ends) if marker.strip() else None


def _whole_words(beginning: str, text: str, special_words: Sequence[str]) -> str:
    """The beginning of a text, without a special token that it cuts."""
    for word in special_words:
        for n in range(1, len(word)):
            if beginning.endswith(word[:n]) and text.startswith(word, len(beginning) - n):
                return beginning[:-n]
    return beginning
