"""Files that ship with the package: recipes, card templates and the quickstart's base and data."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
QUICKSTART_BASE = _PACKAGE / "quickstart" / "base"


def resource_folder(name: str) -> Path:
    """
    Folder of the recipes ("recipes") or card templates ("model_cards"), in an installed package or a checkout.

    Raises:
        FileNotFoundError: the installation is incomplete.
    """
    for candidate in (_PACKAGE / name, _PACKAGE.parent / name):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(f"The folder {name!r} of echo_trainer was not found; the installation is incomplete.")
