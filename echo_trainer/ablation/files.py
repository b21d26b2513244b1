"""Names of a run's files, and writing them whole."""

import json
import os
from pathlib import Path
from typing import Any

RESULT, ITEMS, ERROR = "result.json", "items.json", "error.txt"


def write_json(path: Path, content: Any) -> None:
    """Write a file in one move, so that it is there whole or not at all."""
    write_text(path, json.dumps(content))


def write_text(path: Path, text: str) -> None:
    """Write a file in one move; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
