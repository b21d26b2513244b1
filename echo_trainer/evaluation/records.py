"""Records of a running evaluation on the disk, so that an interrupted one continues where it was."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from .evaluate import Record, Task


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
        self.path, self.identity, self.notes = path, identity, set(notes)
        self.done: dict[int, Record] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and path.stat().st_size:
            self._read()
        else:
            self._append([{"identity": identity}])

    def save(self, records: Sequence[Record]) -> None:
        """Append the records of a batch; they are on the disk when this returns."""
        self._append([_record_entry(record) for record in records])

    def _append(self, entries: list[dict[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in entries))
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):  # killed while it wrote: that line is computed again
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        if not whole:
            self._append([{"identity": self.identity}])
            return
        found, self.done = read_records(self.path)
        changed = sorted(
            key for key in {*found, *self.identity} if _plain(found.get(key)) != _plain(self.identity.get(key))
        )
        if set(changed) - self.notes:
            was = ", ".join(f"{key} {found.get(key)!r} (now {self.identity.get(key)!r})" for key in changed)
            raise ValueError(
                f"{self.path} holds records of another evaluation: {was}. They are not mixed. Give another --output, "
                f"or --restart to delete them."
            )


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


def _plain(value: Any) -> Any:
    """The value as JSON would give it back."""
    return json.loads(json.dumps(value))
