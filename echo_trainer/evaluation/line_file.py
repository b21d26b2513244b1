"""Lines of JSON that grow with an interruptible job; the first says what they belong to."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class LineFile:
    """
    A file of JSON Lines. A line that was cut off by a kill is taken away when it is opened.

    Args:
        path: the file. It is made with its folder if it does not exist.
        identity: everything that decides what the lines say. A file of something else is refused.
        notes: keys of `identity` that only explain; alone they refuse nothing.
        what, job: what the lines are, and of what, for the error.
        advice: what to do about lines of something else, for the error.

    Attributes:
        lines: what stood in the file when it was opened, without the first line.

    Raises:
        ValueError: the file was written for another identity, or is no such file.
    """

    def __init__(
        self, path: Path, identity: dict[str, Any], notes: Sequence[str] = (), *, what: str, job: str, advice: str
    ):
        self.path, self.identity, self.notes = path, identity, set(notes)
        self.what, self.job, self.advice = what, job, advice
        self.lines: list[dict[str, Any]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):  # killed while it wrote: that line is computed again
            self._cut(len(whole))
        if whole:
            self._check(whole)
        else:
            self.append([{"identity": identity}])

    def append(self, entries: Sequence[dict[str, Any]]) -> None:
        """Add lines; they are on the disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in entries))
            file.flush()
            os.fsync(file.fileno())

    def keep(self, count: int) -> None:
        """Take all lines away but the first `count` (and the one that says what they belong to)."""
        if count >= len(self.lines):
            return
        lines = self.path.read_bytes().splitlines(keepends=True)
        self._cut(sum(map(len, lines[: count + 1])))
        self.lines = self.lines[:count]

    def _cut(self, size: int) -> None:
        with self.path.open("r+b") as file:
            file.truncate(size)

    def _check(self, whole: bytes) -> None:
        try:
            header, *self.lines = [json.loads(line) for line in whole.splitlines()]
            found = header["identity"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is no file of {self.what} ({error}). {self.advice}") from error
        changed = sorted(
            key for key in {*found, *self.identity} if _plain(found.get(key)) != _plain(self.identity.get(key))
        )
        if set(changed) - self.notes:
            was = ", ".join(f"{key} {found.get(key)!r} (now {self.identity.get(key)!r})" for key in changed)
            whose = f"{self.what} of another {self.job}"
            raise ValueError(f"{self.path} holds {whose}: {was}. They are not mixed. {self.advice}")


def _plain(value: Any) -> Any:
    """The value as JSON would give it back."""
    return json.loads(json.dumps(value))
