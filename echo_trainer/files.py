"""Files that are whole or not there at all, their checksums, and whether a name is a path or an id on the Hub."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
RUN_RECORD = "echo_run.json"
CARD = "README.md"


def sha256(path: Path) -> str:
    """The checksum of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, finds the old text or the new one; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def write_json(path: Path, content: Any, **options: Any) -> None:
    """Write a value as JSON, as `write_text` does; `options` are those of `json.dumps`."""
    write_text(path, json.dumps(content, **options) + "\n")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name when the block succeeds, and disappears when it fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield stage
        stage.chmod(0o755)
        stage.replace(out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def publish_files(staged: str | os.PathLike, final: str | os.PathLike) -> None:
    """
    Move every file of a complete folder into an existing one, each in one rename, and remove the staging folder.

    Weights go first and the cards last: a reader never finds the description of an adapter that is not there yet.
    """
    staged, final = Path(staged), Path(final)
    files = [path for path in staged.rglob("*") if path.is_file()]
    mask = os.umask(0)
    os.umask(mask)
    for path in sorted(files, key=lambda path: (path.suffix != ".safetensors", path.suffix == ".md", path.name)):
        path.chmod(0o666 & ~mask)  # safetensors lets its owner alone read a file; a server may be another user
        flush(path)
        target = final / path.relative_to(staged)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    flush(final)
    shutil.rmtree(staged)


def flush(path: Path) -> None:
    """Make a file or the names in a folder survive a power failure."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # a system without descriptors of folders
        return
    try:
        os.fsync(descriptor)
    except OSError:  # a file system that cannot; the rename is still atomic for every process
        pass
    finally:
        os.close(descriptor)


def is_local(name: str | None) -> bool:
    """Whether a model's or dataset's name is a path of this machine and not an id on the Hub."""
    if not name:
        return False
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return Path(name).exists()


def id_from_cache(path: str | None) -> str | None:
    """The id of a model that was loaded from a folder of the Hub's cache (`.../models--org--name/snapshots/...`)."""
    match = re.search(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\]", path or "")
    return f"{match[1]}/{match[2]}" if match else None
