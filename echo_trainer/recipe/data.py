"""The dataset that a recipe names: on the Hub, in a folder, or in a file."""

from pathlib import Path
from typing import Any, cast

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from trl import DatasetMixtureConfig, get_dataset

from ..rendering.columns import check_columns, from_columns, refuse_empty, refuse_empty_answers
from ..templates import TEMPLATES
from .arguments import DataArguments

BUILDERS = {
    ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text",
    ".arrow": "arrow",
}  # fmt: skip
"""Ends of the names of data files, and what reads them."""


def load_data(data: DataArguments, mixture: DatasetMixtureConfig) -> Any:
    """
    The dataset, by split.

    `dataset_name` is an id on the Hub, a file (csv, tsv, json, jsonl, parquet, txt, arrow: the split "train"), a
    folder with such files (split by "train" and "test" in their names), or a folder written by `save_to_disk`.

    Raises:
        FileNotFoundError: a file is named that is not there.
        ValueError: no dataset is named, a template or the named columns do not fit it, or a row has no prompt or no
            answer.
    """
    if mixture.datasets:
        dataset = get_dataset(mixture)
    elif data.dataset_name:
        dataset = load_rows_by_split(data.dataset_name, data.dataset_config, bool(data.dataset_streaming))
    else:
        raise ValueError("No dataset: give `dataset_name` (a file, a folder or an id on the Hub) or `datasets`.")
    make, name = _maker(data)
    splits = {}
    for split, rows in ((str(split), rows) for split, rows in dataset.items()):
        if make is not None:
            columns = rows.column_names  # None of a stream whose columns are not known yet
            options: dict[str, Any] = {"desc": f"Writing {split} prompts"} if isinstance(rows, Dataset) else {}
            refuse_empty(rows, split, name)
            rows = rows.map(make, remove_columns=columns, **options)
        else:
            refuse_empty_answers(rows, split)
        check_columns(rows, split)
        splits[split] = rows
    return type(dataset)(splits)


def _maker(data: DataArguments) -> tuple[Any, Any]:
    """What makes a prompt and a completion of a row, and what names their columns; (None, None) for rows that have."""
    prompt, completion = data.prompt_column, data.completion_column
    template = TEMPLATES[data.dataset_template] if data.dataset_template is not None else None
    if not prompt and not completion:
        return template, None
    if not prompt or not completion:
        given = "prompt_column" if prompt else "completion_column"
        raise ValueError(f"`{given}` is given alone. Name both columns: `prompt_column` and `completion_column`.")
    return from_columns(prompt, completion, template), (prompt, completion)


def load_rows(name: str) -> Dataset:
    """
    The rows of a file, a folder or a dataset with one split, whatever their columns are.

    Raises:
        FileNotFoundError: a file is named that is not there.
        ValueError: there are several splits.
    """
    found = load_rows_by_split(name)
    if len(found) != 1:
        raise ValueError(f"{name} has the splits {', '.join(map(str, found))}. Name a file with one of them.")
    return next(iter(found.values()))


def load_rows_by_split(name: str, config: str | None = None, streaming: bool = False) -> Any:
    """Rows by split, whatever their columns are; arguments and errors are those of `load_data`."""
    path = Path(name)
    if (path / "dataset_dict.json").is_file():
        return load_from_disk(name)
    if (path / "state.json").is_file():
        return DatasetDict([("train", cast(Dataset, load_from_disk(name)))])
    builder = BUILDERS.get(path.suffix.lower())
    if builder is None or path.is_dir():
        return load_dataset(name, name=config, streaming=streaming)
    if not path.is_file():
        raise FileNotFoundError(f"{name} is named as a file of rows, and there is none at {path.resolve()}.")
    options: dict[str, Any] = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
    return load_dataset(builder, data_files={"train": str(path)}, streaming=streaming, **options)
