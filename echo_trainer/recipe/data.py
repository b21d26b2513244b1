"""The dataset that a recipe names."""

from pathlib import Path
from typing import Any, cast

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from trl import DatasetMixtureConfig, get_dataset

from ..templates import TEMPLATES
from .arguments import DataArguments


def load_data(data: DataArguments, mixture: DatasetMixtureConfig) -> Any:
    """
    The dataset, by split.

    `dataset_name` is an id on the Hub, a folder with data files (split by "train" and "test" in their names), or a
    folder written by `save_to_disk`.

    Raises:
        ValueError: no dataset is named, or a template does not fit its columns.
    """
    if mixture.datasets:
        dataset = get_dataset(mixture)
    elif data.dataset_name:
        dataset = _load_named(data, data.dataset_name)
    else:
        raise ValueError("No dataset: give `dataset_name` (an id on the Hub or a local folder) or `datasets`.")
    if data.dataset_template is None:
        return dataset
    template = TEMPLATES[data.dataset_template]
    splits = {}
    for split, rows in dataset.items():
        options: dict[str, Any] = {"desc": f"Writing {split} prompts"} if isinstance(rows, Dataset) else {}
        splits[split] = rows.map(template, remove_columns=rows.column_names, **options)
    return type(dataset)(splits)


def _load_named(data: DataArguments, name: str) -> Any:
    folder = Path(name)
    if (folder / "dataset_dict.json").is_file():
        return load_from_disk(name)
    if (folder / "state.json").is_file():
        return DatasetDict([("train", cast(Dataset, load_from_disk(name)))])
    streaming: Any = data.dataset_streaming
    return load_dataset(name, name=data.dataset_config, streaming=streaming)
