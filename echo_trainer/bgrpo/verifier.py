"""What says whether a completion is right: any callable (prompt, completion, row)."""

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..resources import resource_folder

Verifier = Callable[[Any, Any, dict[str, Any]], float]
"""
(prompt, completion, row) -> right.

Args:
    prompt: of the row, as it stands in the dataset: text, or a list of messages.
    completion: what the model answered: text, or a list with the assistant's message, as the prompt.
    row: the other columns of the row.

Returns:
    True or False, or a score from 0 (wrong) to 1 (right).
"""


def score_of(verifier: Verifier, prompt: Any, completion: Any, row: dict[str, Any]) -> float:
    """
    What a verifier says of a completion, as a number from 0 to 1.

    Raises:
        TypeError: it says nothing, or no number.
        ValueError: the number is outside [0, 1].
    """
    given = f"prompt {prompt!r}, completion {completion!r} and row {row!r}"
    score = number_from(
        partial(verifier, prompt, completion, row), "The verifier", given, f"the completion {completion!r}",
        "Return True or False, or a score from 0 to 1.",
    )  # fmt: skip
    if not (math.isfinite(score) and 0 <= score <= 1):
        raise ValueError(
            f"The verifier returned {score} for the completion {completion!r}. A score is from 0 (wrong) to 1 "
            f"(right); rewards beyond that are made by `beam_reward`, a function of (right, rank, group size)."
        )
    return score


def number_from(function: Callable[[], Any], name: str, given: str, where: str, wanted: str) -> float:
    """
    What a function of the user says, as a number.

    Args:
        function: called without arguments.
        name: of the function, for errors.
        given: what it was given, for the note on an error that it raises.
        where: the same for an error about what it returns.
        wanted: what to return instead.

    Raises:
        TypeError: it returns no number.
    """
    try:
        said = function()
    except Exception as error:
        error.add_note(f"{name} raised this for {given}.")
        raise
    try:
        return float(said)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several numbers
        raise TypeError(f"{name} returned {said!r} for {where}. {wanted}") from None


def load_callable(name: str, what: str) -> Callable[..., Any]:
    """
    A function by its name.

    Args:
        name: "FILE.py:FUNCTION", or "MODULE:FUNCTION". A file is looked for in the working directory, then among the
            recipes that ship with the package.
        what: the option, for errors.

    Raises:
        ValueError: there is none, or it cannot be called.
    """
    place, _, function = name.rpartition(":")
    if not place or not function:
        raise ValueError(f"`{what}` is {name!r}. Write FILE.py:FUNCTION, or MODULE:FUNCTION.")
    if place.endswith(".py"):
        shipped = resource_folder("recipes") / place.removeprefix("recipes/")
        path = next((path for path in (Path(place), shipped) if path.is_file()), None)
        if path is None:
            raise ValueError(f"`{what}` names the file {place}, and there is none at {Path(place).resolve()}.")
    else:
        path = None
    try:
        module = importlib.import_module(place) if path is None else _load_file(path, f"{path.stem}_of_{what}")
    except Exception as error:
        kind = "module" if path is None else "file"
        raise ValueError(
            f"`{what}` names the {kind} {place!r}, which cannot be imported: {type(error).__name__}: {error}. Mend "
            f"what it says; `python {path or f'-m {place}'}` shows where."
        ) from error
    found = getattr(module, function, None)
    if not callable(found):
        raise ValueError(f"`{what}` names {function!r} of {place}, where there is no such function.")
    return found


def _load_file(path: Path, name: str) -> Any:
    """A file as a module; as for a script, its neighbours can be imported while it is loaded."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # a file that ends in .py has both
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look for their module
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(folder)
    return module
