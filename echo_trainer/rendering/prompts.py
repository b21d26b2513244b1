"""A row as the prompt a model is asked and the answer it was taught, as text: for generation and for ranking."""

from dataclasses import dataclass
from typing import Any

from .forms import Form, form_of
from .marker import marked_spans
from .messages import messages_of
from .rendering import Rendering
from .rows import renderer


@dataclass(frozen=True)
class Parts:
    """
    Attributes:
        prompt: text up to the last answer.
        completion: text that training teaches after it; an end token is appended to it where it is plain text.
        answer: the answer alone, without what a chat template adds.
        special_tokens: whether the tokenizer adds its special tokens; a chat template has written them already.
    """

    prompt: str
    completion: str
    answer: str
    special_tokens: bool


def parts_of(row: dict[str, Any], rendering: Rendering) -> Parts:
    """
    Prompt and last answer of a row, in the words of training.

    Raises:
        ValueError: a row without both, messages without a chat template, or a chat template that writes a prompt
            differently once it is answered.
    """
    form = form_of(row, rendering.options)
    options = rendering.marked_options(row) if form is Form.TEXT else None
    if options is not None:
        text = row[options.dataset_text_field]
        start, end = marked_spans(text, options, rendering.ends)[-1]
        return Parts(text[:start], text[start:end], text[start:end], True)
    if form is Form.PAIR and isinstance(row["prompt"], str) and isinstance(row["completion"], str):
        return Parts(row["prompt"], row["completion"], row["completion"], True)
    if form is Form.PAIR and isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        return _chat(row, row["prompt"], row["completion"], rendering)
    if form is Form.CONVERSATION:
        messages = messages_of(row)
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=0)
        if last == 0:
            raise ValueError("Its conversation has no answer of the assistant after a prompt.")
        return _chat(row, messages[:last], messages[last : last + 1], rendering)
    raise ValueError(
        f"A row needs `prompt` and `completion`, both text or both messages, `messages`, or `text` with an answer "
        f"marker; this one has {sorted(row)}. Name the columns of a file with --prompt_column and --completion_column "
        f"(and --template chat or alpaca, if training had one)."
    )


def _chat(row: dict[str, Any], prompt: list[Any], completion: list[Any], rendering: Rendering) -> Parts:
    if getattr(rendering.processing_class, "chat_template", None) is None:
        raise ValueError(
            "The rows are messages, and the tokenizer has no chat template to write them as text. Use the model's "
            "tokenizer with a chat template, or rows whose prompt and completion are text (the template 'alpaca' "
            "makes such rows of instructions and answers)."
        )
    render = renderer(row, rendering.processing_class, rendering.chat_template(row))
    text, whole = render(prompt, True), render([*prompt, *completion], False)
    if not whole.startswith(text):
        raise ValueError(
            "The chat template writes the prompt differently once it is answered, so training and evaluation would "
            "differ. Use a chat template that does not, or the template 'alpaca'."
        )
    said = completion[-1].get("content")
    return Parts(text, whole[len(text) :], said if isinstance(said, str) and said else whole[len(text) :], False)
