"""Prompts without answers: rows with `prompt` only, as text or as messages, and the text a model is asked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..rendering.forms import row_name
from ..rendering.messages import as_messages
from ..rendering.rendering import Rendering
from ..rendering.rows import renderer

_ANSWERS = ("completion", "messages", "conversations", "chosen", "labels")


@dataclass(frozen=True)
class Prompt:
    """
    Attributes:
        text: what the model goes on from.
        special_tokens: whether the tokenizer adds its special tokens; a chat template has written them already.
        row: the row: `prompt`, and of messages `tools` and `chat_template_kwargs` where it has them.
    """

    text: str
    special_tokens: bool
    row: dict[str, Any]

    def answered(self, text: str) -> dict[str, Any]:
        """The row with an answer, in a form that training takes."""
        if self.special_tokens:
            return {**self.row, "completion": text}
        return {**self.row, "completion": [{"role": "assistant", "content": text}]}


def read_prompts(rows: Sequence[dict[str, Any]], rendering: Rendering) -> list[Prompt]:
    """
    Prompts, in their order.

    Args:
        rows: with `prompt`: text, or messages that do not end with the assistant's.
        rendering: of the run, for its tokenizer and chat template.

    Raises:
        ValueError: there are none; a row has an answer already, or no prompt that can be answered; the message names
            the row.
    """
    prompts = [_read(row, number, rendering) for number, row in enumerate(rows)]
    if not prompts:
        raise ValueError("There are no prompts: the data has no rows. Give rows with `prompt`, one question each.")
    if len({prompt.special_tokens for prompt in prompts}) > 1:
        raise ValueError(
            "Some prompts are text and others are messages. Give all of them in the form the run was trained on."
        )
    return prompts


def _read(row: Any, number: int, rendering: Rendering) -> Prompt:
    where = row_name(number)
    if not isinstance(row, dict):
        raise ValueError(f"{where} is {type(row).__name__} and not a row with `prompt`.")
    answers = [name for name in _ANSWERS if row.get(name)]
    if answers:
        raise ValueError(
            f"{where} has `{answers[0]}`, so its answer is known. Rows with answers belong to the training data; rows "
            f"to be labelled have `prompt` only."
        )
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError(f"{where} has an empty prompt, so there is nothing to answer. Take it out.")
        return Prompt(prompt, True, {"prompt": prompt})
    if isinstance(prompt, list) and prompt and all(isinstance(turn, dict) for turn in prompt):
        messages = as_messages(prompt, number)
        if messages[-1]["role"] == "assistant":
            raise ValueError(
                f"The prompt of {where[0].lower()}{where[1:]} ends with the assistant's turn, so it is answered. "
                f"Take that turn out, or give the row as training data."
            )
        if getattr(rendering.processing_class, "chat_template", None) is None:
            raise ValueError(
                "The prompts are messages, and the tokenizer has no chat template to write them as text. Give prompts "
                "as text, as the run was trained on."
            )
        kept = {name: row[name] for name in ("tools", "chat_template_kwargs") if row.get(name)}
        asked = {"prompt": messages, **kept}
        return Prompt(renderer(asked, rendering.processing_class)(messages, True), False, asked)
    raise ValueError(
        f"{where} has {sorted(row)} and no `prompt` that is text or a list of messages (role, content). Name the "
        f"column of the questions `prompt`."
    )
