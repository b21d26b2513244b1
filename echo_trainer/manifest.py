"""The list of a checkpoint's files beside them: sizes, checksums, and what must not change between stop and resume."""

import json
import os
import time
from pathlib import Path
from typing import Any

from .files import flush, sha256

MANIFEST = "echo_checkpoint.json"
FACTS = {"adapter", "base_shapes", "echo_learning_rate", "global_batch"}
"""What `run.resume.check_same_run` needs of a manifest."""


def write_manifest(folder: str | os.PathLike, facts: dict[str, Any]) -> None:
    """
    List the files of a checkpoint beside them, with what must not change between stop and resume, and flush it all.

    Args:
        folder: the complete checkpoint.
        facts: JSON values, kept under their names.
    """
    folder = Path(folder)
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST and path.suffix != ".md"  # people may edit a card
    }
    text = json.dumps({"format": 1, "saved_at": time.time(), **facts, "files": files}, indent=1, sort_keys=True)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    for path in (*folder.rglob("*"), folder):
        flush(path)


def read_manifest(folder: str | os.PathLike) -> dict[str, Any] | None:
    """
    What `write_manifest` wrote; None for a checkpoint of another trainer, which has none.

    Raises:
        ValueError: the file is there and is no manifest.
    """
    path = Path(folder, MANIFEST)
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not manifest.keys() >= FACTS or not isinstance(manifest["adapter"], dict):
            raise TypeError
        if not all({"size", "sha256"} <= file.keys() for file in manifest["files"].values()):
            raise TypeError
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError):
        raise ValueError(f"{MANIFEST} cannot be read") from None
    return manifest


def difference(folder: Path, manifest: dict[str, Any]) -> str | None:
    """The first file of a folder that is not what its manifest says, in words; None where all are."""
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size} bytes and had {expected['size']}"
        if sha256(path) != expected["sha256"]:
            return f"{name} has another content than when it was saved"
    return None
