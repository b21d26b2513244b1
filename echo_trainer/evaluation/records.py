"""Records of a running evaluation on the disk, so that an interrupted one continues where it was."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from .evaluate import Record, Task
from .line_file import LineFile


class RecordFile:
    """
    The records of one task as JSON Lines; the first line says what they belong to.

    Args:
        path: the file. It is made with its folder if it does not exist.
        identity: everything that decides the outcome (model, data, options). A file of something else is refused.
        notes: keys of `identity` that only explain (the digest of the items decides); alone they refuse nothing.

    Raises:
        ValueError: the file was written for another identity, or is no file of records.
    """

    def __init__(self, path: Path, identity: dict[str, Any], notes: Sequence[str] = ()):
        advice = "Give another --output, or --restart to delete them."
        self.file = LineFile(path, identity, notes, what="records", job="evaluation", advice=advice)
        self.done: dict[int, Record] = read_records(path)[1]

    def save(self, records: Sequence[Record]) -> None:
        """Append the records of a batch; they are on the disk when this returns."""
        self.file.append([_record_entry(record) for record in records])


def read_records(path: Path) -> tuple[dict[str, Any], dict[int, Record]]:
    """
    What a file of whole lines belongs to, and its records by index.

    Raises:
        ValueError: it is no file of records.
    """
    try:
        header, *lines = [json.loads(line) for line in path.read_bytes().splitlines()]
        known = {field.name for field in fields(Record)}
        found = {line["index"]: Record(**{k: _tuple(v) for k, v in line.items() if k in known}) for line in lines}
        return header["identity"], found
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of records ({error}). Give another --output.") from error


def items_digest(task: Task) -> str:
    """Digest of the questions of a task, as text."""
    digest = hashlib.sha256()
    for item in task.items:
        digest.update(json.dumps([item.prompt, item.reference, item.options, item.completion]).encode())
    return digest.hexdigest()[:16]


def _record_entry(record: Record) -> dict[str, Any]:
    return {name: value for name, value in asdict(record).items() if value is not None}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
