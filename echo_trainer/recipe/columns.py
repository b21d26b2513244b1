"""What the columns of a dataset are: a format that can be trained on, or one that must be turned into it."""

from collections.abc import Callable
from typing import Any

from datasets import Dataset

from ..templates import COLUMNS

FORMATS = ({"prompt", "completion"}, {"messages"}, {"conversations"}, {"text"}, {"input_ids"})
"""Columns of the formats that the trainer takes as they are."""

_LIKELY = [(question, answer) for question, _, answer in COLUMNS]
_SHOWN = 5


def from_columns(prompt: str, completion: str) -> Callable[[dict[str, Any]], dict[str, str]]:
    """A function that takes prompt and completion from two columns; one space parts them unless white space does."""

    def make(row: dict[str, Any]) -> dict[str, str]:
        for column in (prompt, completion):
            if column not in row:
                raise ValueError(f"There is no column {column!r}; the dataset has {', '.join(sorted(row))}.")
        question, answer = str(row[prompt]), str(row[completion])
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
            shown = ", ".join(map(str, empty[:_SHOWN])) + (", ..." if len(empty) > _SHOWN else "")
            raise ValueError(
                f"{len(empty)} of {len(rows)} rows of the split {split!r} have nothing in the column {column!r} (rows "
                f"{shown}, counted from 0). Nothing can be learned from a row without both a question and an answer: "
                f"fill them in or take the rows out."
            )
