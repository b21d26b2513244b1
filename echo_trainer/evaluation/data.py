"""Rows of the tasks: local files, or the public datasets with their columns put into the words of LLM-Adapters.

The words were compared with those files for all tasks but HellaSwag, whose form is the one printed in papers that use
the same data.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..templates import multiple_choice

# Task: dataset id, configuration, split that takes the place of the test set (most keep their test answers back).
HUB: dict[str, tuple[str, str | None, str]] = {
    "boolq": ("google/boolq", None, "validation"),
    "piqa": ("ybisk/piqa", None, "validation"),
    "social_i_qa": ("allenai/social_i_qa", None, "validation"),
    "hellaswag": ("Rowan/hellaswag", None, "validation"),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation"),
    "ARC-Easy": ("allenai/ai2_arc", "ARC-Easy", "test"),
    "ARC-Challenge": ("allenai/ai2_arc", "ARC-Challenge", "test"),
    "openbookqa": ("allenai/openbookqa", "main", "test"),
    "gsm8k": ("openai/gsm8k", "main", "test"),
}


FILES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
"""Ends of the names of files that hold rows."""


def hub_rows(name: str) -> tuple[Sequence[dict[str, Any]], dict[str, str]]:
    """
    Rows of the public dataset of a task, and the id and split they come from.

    Raises:
        ValueError: it cannot be loaded; the message says what to give instead.
    """
    # Imported here: with local data no other module of an evaluation needs it.
    from datasets import load_dataset

    dataset, config, split = HUB[name]
    try:
        rows = load_dataset(dataset, config, split=split)
    except Exception as error:
        try:  # A dataset that was a script: the Hub keeps its rows in this branch.
            rows = load_dataset(dataset, config, split=split, revision="refs/convert/parquet")
        except Exception:
            raise ValueError(
                f"The dataset {dataset} of the task {name} could not be loaded from the Hub ({error}). Give `--data "
                f"FOLDER` with {name}-test.json in the LLM-Adapters format."
            ) from error
    return rows.to_list(), {"dataset": dataset, "split": split}


def task_file(name: str, folder: Path) -> Path | None:
    """The file of a task in a folder: NAME-test.json, NAME-test.jsonl or NAME/test.json; None where there is none."""
    paths = [folder / f"{name}-test.json", folder / f"{name}-test.jsonl", folder / name / "test.json"]
    return next((path for path in paths if path.is_file()), None)


def folder_rows(name: str, folder: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """
    Rows of a task in a local folder, and the file and split they come from.

    Raises:
        FileNotFoundError: it has no file for the task.
    """
    path = task_file(name, folder)
    if path is None:
        present = [task for task in HUB if task_file(task, folder) is not None]
        raise FileNotFoundError(
            f"{folder} has no {name}-test.json, {name}-test.jsonl or {name}/test.json. It has the tasks: "
            f"{', '.join(present) or 'none'}."
        )
    return read_rows(path), {"dataset": path.relative_to(folder).as_posix(), "split": "test"}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """
    Rows of a JSON file (a list), of a JSON Lines file, or of a table, which is read as training reads it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or holds no rows.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    if path.suffix not in (".json", ".jsonl"):
        return _table_rows(path)
    try:
        text = path.read_text(encoding="utf-8")
        rows = _json_lines(text) if path.suffix == ".jsonl" else json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not text in UTF-8: {error}. Convert it, for example with `iconv -t utf-8`."
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not {path.suffix[1:].upper()}: {error}.") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must hold a list of rows (objects), at least one.")
    return rows


def _table_rows(path: Path) -> list[dict[str, Any]]:
    """
    Rows of a csv, tsv or parquet file.

    Raises:
        ValueError: it cannot be read as one, or holds no rows.
    """
    # Imported here: with JSON no other module of an evaluation needs it.
    from datasets import load_dataset

    options: dict[str, Any] = {"sep": "\t"} if path.suffix == ".tsv" else {}
    builder = "parquet" if path.suffix == ".parquet" else "csv"
    try:
        rows: Any = load_dataset(builder, data_files={"train": str(path)}, split="train", **options)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as {path.suffix[1:].upper()}: {error.__cause__ or error}.") from error
    return rows.to_list()


def _json_lines(text: str) -> list[Any]:
    """Values of a JSON Lines text; an error names its line of the file."""
    values = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                values.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise json.JSONDecodeError(f"line {number} of the file: {error.msg}", error.doc, error.pos) from None
    return values


def instruction_row(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """
    A row with `instruction` and `output`, from the LLM-Adapters format or from the columns of the public dataset.

    Raises:
        ValueError: it has the columns of neither.
    """
    if "instruction" in row:
        return row
    try:
        instruction, output = _CONVERTERS[name](row)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"A row of {name} has neither `instruction` and `output` nor the columns of {HUB[name][0]}; it has "
            f"{sorted(row)}."
        ) from error
    return {"instruction": instruction, "output": output}


def _boolq(row: dict[str, Any]) -> tuple[str, str]:
    question = row["question"].rstrip("?")
    return (
        f"Please answer the following question with true or false, question: {question}?\n\nAnswer format: true/false",
        f"the correct answer is {'true' if row['answer'] else 'false'}",
    )


def _piqa(row: dict[str, Any]) -> tuple[str, str]:
    return (
        f"Please choose the correct solution to the question: {row['goal']}\n\nSolution1: {row['sol1']}\n\n"
        f"Solution2: {row['sol2']}\n\nAnswer format: solution1/solution2",
        f"the correct answer is solution{_number(row['label'], 2, first=0)}",
    )


def _social_i_qa(row: dict[str, Any]) -> tuple[str, str]:
    return (
        f"Please choose the correct answer to the question: {row['context']} {row['question']}\n\n"
        f"Answer1: {row['answerA']} Answer2: {row['answerB']} Answer3: {row['answerC']}\n\n"
        f"Answer format: answer1/answer2/answer3",
        f"the correct answer is answer{_number(row['label'], 3, first=1)}",
    )


def _hellaswag(row: dict[str, Any]) -> tuple[str, str]:
    endings = " ".join(f"Ending{number}: {text}" for number, text in enumerate(row["endings"], start=1))
    return (
        f"Please choose the correct ending to complete the given sentence: {row['activity_label']}: {row['ctx']}\n\n"
        f"{endings}\n\nAnswer format: ending1/ending2/ending3/ending4",
        f"the correct answer is ending{_number(row['label'], 4, first=0)}",
    )


def _winogrande(row: dict[str, Any]) -> tuple[str, str]:
    return (
        f"Please choose the correct answer to fill in the blank to complete the given sentence: {row['sentence']}\n\n"
        f"Option1: {row['option1']} Option2: {row['option2']} Answer format: option1/option2",
        f"the correct answer is option{_number(row['answer'], 2, first=1)}",
    )


def _arc(row: dict[str, Any]) -> tuple[str, str]:
    return multiple_choice(row["question"], row["choices"], row["answerKey"])


def _openbookqa(row: dict[str, Any]) -> tuple[str, str]:
    return multiple_choice(row["question_stem"], row["choices"], row["answerKey"])


def _number(label: Any, count: int, first: int) -> int:
    """Number of the right option, from 1. Raises ValueError where a test set keeps its labels back (-1 or "")."""
    number = int(label) - first + 1
    if not 1 <= number <= count:
        raise ValueError(f"label {label!r}")
    return number


_CONVERTERS: dict[str, Callable[[dict[str, Any]], tuple[str, str]]] = {
    "boolq": _boolq,
    "piqa": _piqa,
    "social_i_qa": _social_i_qa,
    "hellaswag": _hellaswag,
    "winogrande": _winogrande,
    "ARC-Easy": _arc,
    "ARC-Challenge": _arc,
    "openbookqa": _openbookqa,
}
