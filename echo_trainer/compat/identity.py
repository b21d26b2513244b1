"""Where a model, a config or a dataset came from, as the libraries note it for themselves.

Private: `_name_or_path` and `_commit_hash` of a transformers config (seen in 5.23, 5.24), `_fingerprint` of a datasets
`Dataset` (5.2). They are written on cards and into records; where one is gone the card says less, and nothing else
changes.
"""

from typing import Any


def name_of(config: Any) -> str | None:
    """The Hub id or folder that a config was loaded from; None where nobody noted it."""
    return getattr(config, "_name_or_path", "") or None


def commit_of(config: Any) -> str | None:
    """The commit of the Hub repository that a config was loaded from."""
    return getattr(config, "_commit_hash", None)


def fingerprint_of(dataset: Any) -> str | None:
    """A hash of a dataset's data and of what was done to it."""
    return getattr(dataset, "_fingerprint", None)
