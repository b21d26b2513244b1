"""What says whether a completion is right: any callable (prompt, completion, row)."""

import importlib
import importlib.util
import math
from collections.abc import Callable
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
    said = verifier(prompt, completion, row)
    try:
        score = float(said)
    except (TypeError, ValueError):
        raise TypeError(
            f"The verifier returned {said!r} for the completion {completion!r}. Return True or False, or a score "
            f"from 0 to 1."
        ) from None
    if not (math.isfinite(score) and 0 <= score <= 1):
        raise ValueError(
            f"The verifier returned {score} for the completion {completion!r}. A score is from 0 (wrong) to 1 "
            f"(right); rewards beyond that are made by `beam_reward`, a function of (right, rank, group size)."
        )
    return score


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
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None  # a file that ends in .py has both
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(place)
        except ImportError as error:
            raise ValueError(f"`{what}` names the module {place!r}, which cannot be imported: {error}.") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise ValueError(f"`{what}` names {function!r} of {place}, where there is no such function.")
    return found
