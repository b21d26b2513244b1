"""Checkpoint folders that are whole or not there at all.

A checkpoint is written into a staging folder, gets a list of its files (size and SHA-256), is flushed to disk and then
renamed into its place. So a run that is killed at any moment leaves whole checkpoints and, at most, a staging folder
that the next save clears. An old one that is deleted loses its name before it loses a file. What a disk does to a
checkpoint later is seen by its list before anything is loaded.
"""

import json
import os
import re
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..files import flush
from ..manifest import difference, read_manifest

STAGING = ".unfinished"
REPLACED = ".replaced-"
DELETED = ".deleted-"
STATE = "trainer_state.json"
_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def is_checkpoint(folder: str | os.PathLike) -> bool:
    """Whether a folder is named like a checkpoint of the Trainer."""
    return bool(_CHECKPOINT.fullmatch(Path(folder).name))


def checkpoints(run_dir: str | os.PathLike) -> list[Path]:
    """The checkpoint folders of a run, the latest step first."""
    run_dir = Path(run_dir)
    found = [p for p in run_dir.iterdir() if p.is_dir() and is_checkpoint(p)] if run_dir.is_dir() else []
    return sorted(found, key=_step_of, reverse=True)


def damage(folder: str | os.PathLike) -> str | None:
    """
    What is wrong with a checkpoint, None if it is whole.

    With a manifest every file is compared with it. Without one (a checkpoint of `SFTTrainer`) only the trainer's state
    is looked at, which transformers writes last.
    """
    folder = Path(folder)
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return str(error)
    return _damaged_state(folder) if manifest is None else difference(folder, manifest)


def _damaged_state(folder: Path) -> str | None:
    path = folder / STATE
    if not path.is_file():
        return f"{STATE} is missing"
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        return f"{STATE} cannot be read"
    return None


def last_whole_checkpoint(run_dir: str | os.PathLike) -> tuple[Path | None, dict[str, str]]:
    """
    The latest checkpoint of a run that is whole, and what is wrong with the later ones.

    Returns:
        Its folder, or None; and a description of the damage by name of the folder.
    """
    broken = {}
    for folder in checkpoints(run_dir):
        why = damage(folder)
        if why is None:
            return folder, broken
        broken[folder.name] = why
    return None, broken


def publish(staged: str | os.PathLike, final: str | os.PathLike) -> None:
    """Rename a complete folder into its place. What stood there before is removed afterwards."""
    staged, final = Path(staged), Path(final)
    old = final.with_name(f"{REPLACED}{final.name}")
    if final.exists():
        if old.exists():
            shutil.rmtree(old)
        final.rename(old)
    try:
        staged.rename(final)
    except OSError:
        if old.exists():
            old.rename(final)
        raise
    flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def bring_back(run_dir: str | os.PathLike) -> None:
    """Undo a replacement that was killed between its two renames: the old checkpoint gets its name back."""
    for old in Path(run_dir).glob(f"{REPLACED}{PREFIX_CHECKPOINT_DIR}-*"):
        final = old.with_name(old.name.removeprefix(REPLACED))
        if final.exists():
            shutil.rmtree(old)
        else:
            old.rename(final)


def rotate(run_dir: str | os.PathLike, limit: int | None, keep: list[str | os.PathLike | None]) -> None:
    """
    Delete old checkpoints of a run, and what is left of deletions that were killed.

    Not transformers' `rotate_checkpoints`: killed on the way it leaves half a checkpoint under its name, which counts
    as the most recent one from then on, so that whole ones are deleted for it.

    Args:
        run_dir: folder of the run.
        limit: how many to keep, `save_total_limit`; None or 0 keeps all.
        keep: those never to delete: the one just saved, the best one.
    """
    for rest in Path(run_dir).glob(f"{DELETED}*"):
        shutil.rmtree(rest, ignore_errors=True)
    if not limit or limit < 0:
        return
    kept = {os.path.abspath(folder) for folder in keep if folder}
    found = sorted(checkpoints(run_dir), key=_saved_at)
    n_protected = sum(os.path.abspath(folder) in kept for folder in found)
    others = [folder for folder in found if os.path.abspath(folder) not in kept]
    for folder in others[: max(0, len(others) - max(0, limit - n_protected))]:
        unnamed = folder.with_name(f"{DELETED}{folder.name}")
        folder.rename(unnamed)
        shutil.rmtree(unnamed, ignore_errors=True)


def _step_of(checkpoint: Path) -> int:
    name = _CHECKPOINT.fullmatch(checkpoint.name)
    assert name is not None  # else it is no checkpoint
    return int(name[1])


def _saved_at(folder: Path) -> tuple[float, int]:
    """When a checkpoint was saved, in seconds, and its step; one without a state is older than any."""
    state, step = folder / STATE, _step_of(folder)
    try:
        manifest = read_manifest(folder) or {}
    except ValueError:
        manifest = {}
    # A copied folder has other times than its files had; a run that went on from an early checkpoint has later steps
    # that are older.
    return manifest.get("saved_at", state.stat().st_mtime) if state.is_file() else 0.0, step
