"""Datasets of rows, and what is done to each of their rows."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import pyarrow
from datasets import Dataset, Features, Json, List

from .forms import RowOptions
from .rows import has_marker

logger = logging.getLogger(__name__)

MESSAGES = List(Json())
"""Messages of which one has keys, calls and arguments that another lacks."""


def map_rows(
    dataset: Any,
    function: Any,
    doing: str,
    name: str,
    num_proc: int | None,
    drop: Sequence[str] = (),
    messages: Sequence[str] = (),
) -> Any:
    """
    Rows changed one by one.

    Args:
        dataset: a `Dataset` or `IterableDataset`.
        function: gets a row and its number.
        doing, name: for the progress bar.
        num_proc: processes.
        drop: columns that are left out.
        messages: columns of messages that the function writes.
    """
    options: dict[str, Any] = {"with_indices": True, "remove_columns": list(drop) or None}
    if messages and dataset.features is not None:
        kept = {column: feature for column, feature in dataset.features.items() if column not in drop}
        options["features"] = Features({**kept, **dict.fromkeys(messages, MESSAGES)})
    if isinstance(dataset, Dataset):
        options |= {"num_proc": num_proc, "desc": f"{doing} {name} dataset"}
    return dataset.map(function, **options)


def drop_unmarked(dataset: Any, options: RowOptions, tokenizer: Any, ends: Sequence[str]) -> Any:
    """The texts that hold an answer behind a marker; how many do not is said."""
    kept = dataset.filter(partial(has_marker, options=options, tokenizer=tokenizer, ends=ends))
    if isinstance(dataset, Dataset) and len(kept) < len(dataset):
        logger.warning(
            "%d of %d rows do not hold the answer marker %r with an answer after it and are dropped.",
            len(dataset) - len(kept),
            len(dataset),
            options.answer_marker,
        )
    return kept


def as_dataset(rows: Sequence[dict[str, Any]]) -> Dataset:
    """
    Rows as a dataset holds them: a key that one row has and another lacks is None there.

    Raises:
        ValueError: values of one column are of different kinds.
    """
    try:
        return Dataset.from_list(list(rows))
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        raise ValueError(
            f"The rows cannot be held in one dataset, since values of a column are of different kinds ({error}). "
            f"Write nested values, such as `tools`, as JSON text."
        ) from error
