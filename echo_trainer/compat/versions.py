"""Which releases this version was tested with, and which are installed."""

import logging
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

logger = logging.getLogger(__name__)
_said = False

TESTED = {
    "torch": "2.13.0",
    "transformers": "5.24.0",
    "trl": "1.16.0",
    "peft": "0.21.2",
    "accelerate": "1.15.0",
    "datasets": "5.2.0",
    "evaluate": "0.4.6",
    "huggingface_hub": "2.4.0",
    "safetensors": "0.8.0",
    "tokenizers": "0.23.3",
}
"""The newest release of each dependency that the tests have passed with."""


@lru_cache(maxsize=1)
def installed() -> dict[str, str | None]:
    """Version of each package of `TESTED`; None where it is not installed."""
    return {name: _version(name) for name in TESTED}


def newer_than_tested() -> dict[str, tuple[str, str]]:
    """Packages whose installed release is newer than what was tested: (installed, tested)."""
    found = {}
    for name, tested in TESTED.items():
        there = installed()[name]
        if there is not None and Version(Version(there).public) > Version(tested):
            found[name] = (there, tested)
    return found


def warn_of_newer() -> None:
    """Say, once in a process, which packages are newer than what was tested."""
    global _said
    if _said or not newer_than_tested():
        return
    _said = True
    newer = ", ".join(f"{name} {there} (tested: {tested})" for name, (there, tested) in newer_than_tested().items())
    logger.warning(
        "Newer than what this version of echo_trainer was tested with: %s. What must be exact is checked at the first "
        "step; if something else looks wrong, install the tested versions (constraints.txt) and report it.",
        newer,
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
