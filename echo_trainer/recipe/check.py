"""Whether a recipe can be what its author meant, said before anything is loaded or written."""

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any, Union

WRITTEN_PATHS = ("logging_dir", "offload_folder")
"""Options that name a folder which is written to; `output_dir` is the only other one."""

_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    list: "a list",
    dict: "a mapping",
}


def check_options(
    path: str | Path, recipe: dict[str, Any], classes: tuple[type, ...], command: str = "echo-trainer sft"
) -> None:
    """
    Refuse what cannot work.

    Args:
        path: of the recipe, for errors.
        recipe: its content.
        classes: the dataclasses whose fields it may set.
        command: that takes the recipe, for errors.

    Raises:
        ValueError: an unknown key, a list or mapping where a single value belongs (or the other way round),
            environment variables, or a folder outside `output_dir` that would be written to.
    """
    hints = {name: hint for cls in classes for name, hint in typing.get_type_hints(cls).items()}
    choices = {field.name: field.metadata.get("choices") for cls in classes for field in dataclasses.fields(cls)}
    for key, value in recipe.items():
        if key == "env":
            raise ValueError(
                f"The recipe {path} sets environment variables (`env`). A recipe describes a run and leaves the "
                f"process alone: set them in the shell, or in the accelerate config."
            )
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            raise ValueError(
                f"The recipe {path} has the key {key!r}, which is no option of `{command}`. "
                + (f"Did you mean {close[0]!r}?" if close else f"`{command} --help` lists the options.")
            )
        _check_kind(path, key, value, hints[key])
        allowed = choices.get(key)
        if value is not None and allowed and value not in allowed:
            raise ValueError(f"`{key}` is {value!r} in the recipe {path}. It can be one of {list(allowed)}.")
    _check_written_paths(path, recipe)


def _check_kind(path: str | Path, key: str, value: Any, hint: Any) -> None:
    """Refuse lists, mappings and nothing where the option takes none of them; argparse looks at the rest."""
    accepted = _kinds(hint)
    if type(None) in accepted and value is None:
        return
    if value is None:
        raise ValueError(f"`{key}` has no value in the recipe {path}. Write one, or leave the line out.")
    for kind, name in ((list, "list"), (dict, "mapping")):
        if isinstance(value, kind) and kind not in accepted and Any not in accepted:
            raise ValueError(f"`{key}` is a {name} in the recipe {path}: {value!r}. It takes {_named(accepted)}.")
    if isinstance(value, bool) and not accepted & {bool, str, Any}:
        raise ValueError(f"`{key}` is {str(value).lower()} in the recipe {path}. It takes {_named(accepted)}.")
    if not isinstance(value, str | int | float | bool | list | dict):
        raise ValueError(f"`{key}` is a {type(value).__name__} in the recipe {path}: {value}. Put it in quotes.")


def _kinds(hint: Any) -> set[Any]:
    if typing.get_origin(hint) in (Union, types.UnionType):
        return set().union(*(_kinds(part) for part in typing.get_args(hint)))
    return {typing.get_origin(hint) or hint}


def _named(kinds: set[Any]) -> str:
    known = [name for kind, name in _NAMES.items() if kind in kinds]
    return " or ".join(known) if known else "one of its choices"


def _check_written_paths(path: str | Path, recipe: dict[str, Any]) -> None:
    inside = Path(str(recipe.get("output_dir") or "trainer_output")).resolve()
    nested = recipe.get("model_init_kwargs")
    places = {**recipe, **(nested if isinstance(nested, dict) else {})}
    for key in WRITTEN_PATHS:
        value = places.get(key)
        if isinstance(value, str) and not Path(value).resolve().is_relative_to(inside):
            raise ValueError(
                f"`{key}` in the recipe {path} names {value!r}, which is outside output_dir. A run writes into its "
                f"output_dir only: write a folder below it."
            )
