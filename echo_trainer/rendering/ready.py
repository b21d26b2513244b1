"""What is known of the answers of a dataset before TRL prepares it."""

from dataclasses import dataclass
from typing import Any

from trl import get_training_chat_template
from trl.chat_template_utils import has_generation_markers

from .forms import Form


@dataclass(frozen=True)
class Ready:
    """
    Rows that TRL can prepare, and what to tell it.

    Attributes:
        dataset: the rows; with `input_ids` and `labels` where TRL cannot make them.
        assistant_only_loss: whether TRL masks all but the assistant's turns.
        chat_template: in place of the tokenizer's; None leaves that.
        formatting_func: what TRL is to apply; None where it was applied already.
        form: of the rows as they were given.
        how: what their answers are, in words.
        said: what was found out about the rows that nobody had said, for the log; "" where that is nothing.
    """

    dataset: Any
    form: Form
    how: str
    assistant_only_loss: bool = False
    chat_template: str | None = None
    formatting_func: Any = None
    said: str = ""


@dataclass(frozen=True)
class Marks:
    """Whether a chat template marks the assistant's turns: itself, by a template of TRL's in its place, or not."""

    known: bool
    chat_template: str | None = None
    how: str = "found by rendering each conversation up to its turns"


HOW = {
    Form.PAIR: "the completion",
    Form.TOKENS: "the tokens that have a label",
    Form.TEXT: "not told from the prompts",
}


def marks_of(processing_class: Any) -> Marks:
    """
    How the assistant's turns are told from the rest in what a chat template writes.

    Raises:
        ValueError: there is no chat template.
    """
    template = template_of(processing_class)
    if has_generation_markers(template):
        return Marks(True, None, "marked by the chat template")
    try:
        return Marks(True, get_training_chat_template(processing_class), "marked by TRL's training template")
    except ValueError:  # TRL has none for this family
        return Marks(False)


def template_of(processing_class: Any) -> str:
    """
    The chat template that messages are written with.

    Raises:
        ValueError: there is none.
    """
    template = getattr(processing_class, "chat_template", None)
    if template is None:
        raise ValueError(
            "The rows are conversations, and the tokenizer has no chat template to write them as text. Name one "
            "in chat_template_path (a Jinja file, or a model that has one), take the tokenizer of the model's "
            "chat variant, or use rows whose prompt and completion are text: in a recipe `dataset_template: alpaca` "
            "writes instructions or questions and their answers as text."
        )
    return template
