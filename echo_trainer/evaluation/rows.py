"""The rows of a task: which are drawn, what each asks and answers, and the options of multiple choice."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..rendering.forms import COLUMNS, RowOptions
from ..rendering.mapping import as_dataset
from ..rendering.prompts import Parts, parts_of
from ..rendering.rendering import Rendering
from ..templates import TEMPLATES

OPTIONS = "options"
"""The column of a file with the completions to choose from."""


def template_of(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """
    A template by its name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in TEMPLATES:
        raise ValueError(f"The template {name!r} is unknown. Use one of {', '.join(TEMPLATES)}.")
    return TEMPLATES[name]


def templated_rows(
    name: str, rows: Sequence[dict[str, Any]], template: str | None, limit: int | None, seed: int, rendering: Rendering
) -> tuple[list[tuple[int, dict[str, Any], Parts]], bool]:
    """Number, row and parts of every drawn row, and whether the tokenizer adds its special tokens to them."""
    found, make, special_tokens = [], None if template is None else template_of(template), True
    for number, row in drawn_rows(rows if make is not None else _as_trained(rows, rendering.options), limit, seed):
        with naming_row(name, number):
            example = row if make is None else make(row)
            parts = parts_of(example, rendering)
            if not parts.prompt:
                raise ValueError("its prompt is empty, so there is nothing to answer.")
        special_tokens = parts.special_tokens
        found.append((number, example, parts))
    return found, special_tokens


def _as_trained(rows: Sequence[dict[str, Any]], options: RowOptions) -> list[dict[str, Any]]:
    """The columns of rows that decide how they are written, with the values that they have in a dataset."""
    known = (*COLUMNS, options.dataset_text_field)
    kept = [{name: row[name] for name in known if name in row} for row in rows]
    if not any("tools" in row or "chat_template_kwargs" in row for row in kept):
        return [found or dict(row) for found, row in zip(kept, rows, strict=True)]
    return [{name: value for name, value in row.items() if value is not None} for row in as_dataset(kept).to_list()]


@contextmanager
def naming_row(task: str, number: int) -> Iterator[None]:
    """Say which row of a task an error is about, counted from 1."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"Row {number} of {task}: {error}") from error


def drawn_rows(rows: Sequence[dict[str, Any]], limit: int | None, seed: int) -> list[tuple[int, dict[str, Any]]]:
    """`limit` rows drawn with `seed`, in their order, each with its number, counted from 1; all without a limit."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} leaves no items. Use at least 1, or None for all.")
    if limit is None or limit >= len(rows):
        return list(enumerate(rows, start=1))
    chosen = random.Random(seed).sample(range(len(rows)), limit)
    return [(index + 1, rows[index]) for index in sorted(chosen)]


def choices_of(row: dict[str, Any], parts: Parts) -> tuple[str, ...]:
    """
    The completions that a row lets a model choose from: its column `options`, where that is a list of texts and the
    completion of the row is one of them; else none.

    Args:
        row: of a file.
        parts: of the same row, as training writes it.
    """
    given, completion = row.get(OPTIONS), row.get("completion")
    if not isinstance(completion, str) or not isinstance(given, list) or len(given) < 2:
        return ()
    if (
        not all(isinstance(each, str) for each in given)
        or [each.strip() for each in given].count(completion.strip()) != 1
    ):
        return ()
    lead = parts.completion[: len(parts.completion) - len(parts.completion.lstrip())]
    return tuple(lead + each.strip() for each in given)
