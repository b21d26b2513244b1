"""The forms of a row, and what is said about them: by the row itself, and by the options of a run."""

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from trl.data_utils import is_conversational

# Speakers of collections (ShareGPT), by the role that chat templates know them under.
SPEAKERS = {
    "human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "model": "assistant",
}  # fmt: skip
ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")}
RESULTS = {"observation": "tool", "function_response": "tool"}

COLUMNS = ("prompt", "completion", "messages", "conversations", "tools", "chat_template_kwargs")
"""Columns that decide how a row is written, beside that of a text."""

# Columns that make TRL take a conversation for a row of another kind.
MISLEADING = ("prompt", "chosen", "rejected", "label")


class Form(StrEnum):
    """What a row is."""

    TOKENS = "token ids"
    PAIR = "prompt and completion"
    CONVERSATION = "a conversation"
    TEXT = "text"
    OTHER = "none of the known forms"


@dataclass(frozen=True)
class RowOptions:
    """
    What a run says about its rows; the fields of `EchoSFTConfig` with these names.

    Attributes:
        dataset_text_field: column of a text.
        answer_marker: in a text, what stands before each answer.
        prompt_marker: in a text of several turns, what stands before each prompt.
        drop_without_marker: drop texts that hold no answer marker; else they are an error.
        assistant_only_loss: the answers of a conversation are the assistant's turns; None where nobody said.
    """

    dataset_text_field: str = "text"
    answer_marker: str | None = None
    prompt_marker: str | None = None
    drop_without_marker: bool = False
    assistant_only_loss: bool | None = None

    @classmethod
    def of(cls, source: Any) -> "RowOptions":
        """The options in a configuration, or in the record of a run (a dict, of which other keys are ignored)."""
        names = [field.name for field in fields(cls)]
        if isinstance(source, dict):
            return cls(**{name: source[name] for name in names if name in source})
        return cls(**{name: getattr(source, name) for name in names})


def form_of(row: dict[str, Any], options: RowOptions) -> Form:
    """The form of a row; with an answer marker a text counts before anything else that the row holds."""
    if "input_ids" in row:
        return Form.TOKENS
    if options.answer_marker is not None and options.dataset_text_field in row:
        return Form.TEXT
    if "prompt" in row and "completion" in row:
        return Form.PAIR
    if "messages" in row or "conversations" in row:
        return Form.CONVERSATION
    return Form.TEXT if options.dataset_text_field in row else Form.OTHER


def is_chat(row: dict[str, Any]) -> bool:
    """Whether prompt and completion of a row are messages."""
    return is_conversational({"prompt": row["prompt"]})


def as_messages(turns: list[dict[str, Any]], number: int | None = None) -> list[dict[str, Any]]:
    """
    Messages (role, content) from turns of any of the usual spellings (from, value; human, gpt).

    Args:
        turns: of one conversation.
        number: of its row, for the error.

    Raises:
        ValueError: a turn `from` somebody whom nobody knows.
    """
    messages = []
    for turn in turns:
        rest = {key: value for key, value in turn.items() if key not in ("from", "value", "role")}
        role = SPEAKERS.get(str(turn.get("role")).lower(), turn.get("role"))  # a template may know others
        if turn.get("from") is not None:
            known = {**ROLES, **SPEAKERS, **RESULTS}
            role = known.get(str(turn["from"]).lower())
            if role is None:
                raise ValueError(
                    f"{row_name(number)} has a turn from {turn['from']!r}, whose role is not known. Known are "
                    f"{', '.join(known)}: rename it in the rows."
                )
        said = {"content": turn["value"]} if turn.get("value") is not None else {}
        messages.append({"role": role, **rest, **said})
    return messages


def row_name(number: int | None) -> str:
    """How errors call a row."""
    return "A row" if number is None else f"Row {number} (the first is row 0)"
