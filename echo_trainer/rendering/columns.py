"""What the columns of a dataset are: a format that can be trained on, or one that must be turned into it."""

from collections.abc import Callable
from typing import Any

from datasets import Dataset

from ..templates import COLUMNS
from .messages import SPEAKERS

FORMATS = ({"prompt", "completion"}, {"messages"}, {"conversations"}, {"text"}, {"input_ids"})
"""Columns of the formats that the trainer takes as they are."""

_LIKELY = [(question, answer) for question, _, answer in COLUMNS]
_SHOWN = 5


def from_columns(
    prompt: str, completion: str, template: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """
    A function that takes prompt and completion from two columns; one space parts them unless white space does.

    Args:
        prompt, completion: names of the columns.
        template: one of `templates.TEMPLATES`, which writes what is in them; None takes it as it stands.
    """

    def make(row: dict[str, Any]) -> dict[str, Any]:
        for column in (prompt, completion):
            if column not in row:
                raise ValueError(f"There is no column {column!r}; the dataset has {', '.join(sorted(row))}.")
        question, answer = str(row[prompt]), str(row[completion])
        if template is not None:
            return template({"question": question, "answer": answer})
        parted = question[-1:].isspace() or answer[:1].isspace()
        return {"prompt": question, "completion": answer if parted else f" {answer}"}

    return make


def check_columns(rows: Any, split: str) -> None:
    """
    Refuse rows in which nobody can tell the prompt from the answer.

    Raises:
        ValueError: the columns are of no known format.
    """
    columns = rows.column_names
    if columns is None or any(format <= set(columns) for format in FORMATS):
        return
    likely = next((pair for pair in _LIKELY if set(pair) <= set(columns)), None)
    if likely:
        question, answer = likely
        advice = (
            f"Write `dataset_template: alpaca` (for base models; `chat` for models with a chat template), or "
            f"`prompt_column: {question}` and `completion_column: {answer}` to take them as they stand."
        )
    else:
        advice = (
            "Name the columns of question and answer: `prompt_column: ...` and `completion_column: ...`; or give rows "
            "with prompt and completion, or messages."
        )
    raise ValueError(
        f"The split {split!r} of the dataset has the columns {', '.join(sorted(columns))}, and none of them is known "
        f"to hold a prompt or an answer. {advice}"
    )


def refuse_empty(rows: Any, split: str, columns: tuple[str, str] | None) -> None:
    """
    Refuse rows without a question or an answer, by their numbers; a stream is not looked at.

    Args:
        rows: a split of the dataset.
        split: its name, for the error.
        columns: of prompt and completion; None for those that a template takes.

    Raises:
        ValueError: a row has nothing in one of them.
    """
    if not isinstance(rows, Dataset):
        return
    known = [pair for pair in ([columns] if columns else _LIKELY) if set(pair) <= set(rows.column_names)]
    for column in known[0] if known else ():
        empty = [n for n, value in enumerate(rows[column]) if value is None or not str(value).strip()]
        if empty:
            raise _empty(empty, rows, split, f"nothing in the column {column!r}")


def refuse_empty_answers(rows: Any, split: str) -> None:
    """
    Refuse completions and turns of the assistant without a word, by the numbers of their rows; no stream is looked at.

    A turn that calls a tool needs no words.

    Args:
        rows: a split of the dataset, in a format of TRL.
        split: its name, for the error.

    Raises:
        ValueError: there are some.
    """
    known = [name for name in ("completion", "messages", "conversations") if name in (rows.column_names or [])]
    if not isinstance(rows, Dataset) or not known or "input_ids" in rows.column_names:
        return
    column = known[0]
    empty = [n for n, value in enumerate(rows[column]) if _says_nothing(value, column)]
    if empty:
        raise _empty(empty, rows, split, f"an answer without a word in the column {column!r}")


def _says_nothing(value: Any, column: str) -> bool:
    """Whether a completion, or a turn of the assistant, is empty."""
    if value is None or isinstance(value, str):  # messages may be JSON text, which is read later
        return not (value or "").strip()
    turns = [turn for turn in value if column == "completion" or _of_the_assistant(turn)]
    return any(not _words(turn) and not turn.get("tool_calls") for turn in turns) or (not value)


def _of_the_assistant(turn: dict[str, Any]) -> bool:
    who = str(turn.get("role") or turn.get("from")).lower()
    return SPEAKERS.get(who, who) == "assistant"


def _words(turn: dict[str, Any]) -> bool:
    said = turn.get("content") if turn.get("content") is not None else turn.get("value")
    return bool(said.strip()) if isinstance(said, str) else bool(said)


def _empty(empty: list[int], rows: Dataset, split: str, what: str) -> ValueError:
    shown = ", ".join(map(str, empty[:_SHOWN])) + (", ..." if len(empty) > _SHOWN else "")
    return ValueError(
        f"{len(empty)} of {len(rows)} rows of the split {split!r} have {what} (rows {shown}, counted from 0). Nothing "
        f"can be learned from a row without both a question and an answer: fill them in or take the rows out."
    )
