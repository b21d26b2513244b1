"""Finished runs on disk."""

import json
from pathlib import Path
from typing import Any

from .files import ITEMS, RESULT
from .plan import Run, changed_parts, digest, run_folder


def load_result(output: Path, run: Run) -> dict[str, Any] | None:
    """`result.json` of a run, None where it is not finished."""
    path = run_folder(output, run) / RESULT
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def load_items(output: Path, run: Run) -> dict[str, dict[str, list]]:
    """By task: lists `correct`, `nll` and `prediction`, one entry an item."""
    return json.loads((run_folder(output, run) / ITEMS).read_text(encoding="utf-8"))


def is_finished(output: Path, run: Run, spec: dict[str, Any]) -> bool:
    """
    Whether a run has a result.

    Raises:
        ValueError: it has one, of another recipe.
    """
    result = load_result(output, run)
    if result is None:
        return False
    if result["hash"] != digest(spec):
        changes = changed_parts(result["spec"], json.loads(json.dumps(spec)))
        raise ValueError(
            f"{run_folder(output, run)} holds a result of another recipe: {'; '.join(changes)}. Results of different "
            f"recipes cannot be compared. Give a new --output, or delete that folder to run it again."
        )
    return True
