"""The record of the run beside an exported adapter: true of the new files, or not there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jinja2

from ..adapter.write import RECORD
from .folder import update_record


def renew_record(folder: Path, base: Any, **changes: Any) -> bool:
    """
    Read again what a record says of the adapter's files, change the entries given, and make the card again.

    Args:
        folder: the exported adapter, with the record of the run that it comes from, if there is one.
        base: the base or its name, for the engines' verdicts; None takes the name in the adapter's config.
        changes: new values of the record's entries.

    Returns:
        Whether record and card are now those of the new files. False where there is no record, it is of an older
        version or damaged, or the card was edited by hand (then it stays as it is).
    """
    try:
        return update_record(folder, base, **changes)
    except (ValueError, KeyError, TypeError, jinja2.TemplateError):  # the export is right without a card
        return False


def remove_record(folder: Path) -> None:
    """Remove the record and its pictures; what they say of the weights does not hold."""
    for name in RECORD:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
