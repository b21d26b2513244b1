"""The forms of a row, and what is said about them: by the row itself, and by the options of a run."""

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from trl.data_utils import is_conversational

COLUMNS = ("prompt", "completion", "messages", "conversations", "tools", "chat_template_kwargs")
"""Columns that decide how a row is written, beside that of a text."""

FORMATS = (
    "Echo-LoRA needs one of these formats: {'prompt': ..., 'completion': ...} (text or messages); "
    "{'messages': [...]}, whose answers are the assistant's turns; {'text': ...} with answer_marker, such as "
    "'### Response:\\n'; or 'input_ids' with 'labels' that are -100 on the prompt. Mask a dataset before the trainer "
    "is made, or give a collator that masks as `data_collator`."
)

# Columns of published data, by those that they stand for.
RENAMED = {
    "question": "prompt", "query": "prompt", "instruction": "prompt", "input": "prompt", "problem": "prompt",
    "answer": "completion", "response": "completion", "output": "completion", "solution": "completion",
}  # fmt: skip

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


def row_name(number: int | None) -> str:
    """How errors call a row."""
    return "A row" if number is None else f"Row {number} (the first is row 0)"


def check_form(row: dict[str, Any], form: Form) -> None:
    """
    Refuse a row whose columns are none of the known ones, or do not fit together.

    Args:
        row: the first of a dataset.
        form: of it.

    Raises:
        ValueError: it is; the message says how the columns are to be called.
    """
    empty = [name for name in ("prompt", "completion") if form is Form.PAIR and row[name] is None]
    if empty:
        raise ValueError(f"The first row has None for {' and '.join(map(repr, empty))}. Write its text, or drop it.")
    if form is Form.PAIR and isinstance(row["prompt"], str) is not isinstance(row["completion"], str):
        kinds = {name: "text" if isinstance(row[name], str) else "messages" for name in ("prompt", "completion")}
        raise ValueError(
            f"`prompt` is {kinds['prompt']} and `completion` is {kinds['completion']}. Write both as text or both as "
            f"messages: [{{'role': 'user', 'content': ...}}] and [{{'role': 'assistant', 'content': ...}}]."
        )
    if form is Form.OTHER:
        raise ValueError(
            f"The rows have the columns {sorted(row)}, which say nothing of prompts and answers. {_renaming(row)}"
            f"{FORMATS}"
        )


def _name_of_chosen(row: dict[str, Any]) -> str:
    """What the chosen answer of a preference is, which may hold the prompt as well."""
    chosen = row["chosen"]
    if isinstance(chosen, list) and chosen and chosen[0].get("role") != "assistant":
        return "messages"
    return "completion" if "prompt" in row else "text"


def _renaming(row: dict[str, Any]) -> str:
    """The line that makes one of the known forms of a row, where its columns are those of much published data."""
    if "chosen" in row and "rejected" in row:
        return f"Of preferences, write dataset.rename_column('chosen', {_name_of_chosen(row)!r}). "
    for name, value in row.items():
        first = value[0] if isinstance(value, list) and value else None
        if isinstance(first, dict) and ("role" in first or "from" in first):
            return f"Write dataset.rename_column({name!r}, 'messages'). "
    if "instruction" in row and "input" in row and "output" in row:
        return (
            "Write dataset.map(lambda row: {'prompt': f\"{row['instruction']}\\n\\n{row['input']}\\n\\n\", "
            "'completion': row['output']}, remove_columns=dataset.column_names), or dataset_template: alpaca in a "
            "recipe. "
        )
    names = {name: RENAMED.get(name, name) for name in row}
    if sorted(name for name in names.values() if name in ("prompt", "completion")) == ["completion", "prompt"]:
        changed = {name: new for name, new in names.items() if name != new}
        return f"Write dataset.rename_columns({changed!r}). "
    return ""
