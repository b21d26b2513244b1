"""Recipes: YAML files with the options of a run, found by name after installation."""

from pathlib import Path

from ..resources import resource_folder


def available_recipes() -> list[str]:
    """Names of the recipes that ship with the package, such as "smollm2-135m/openbookqa"."""
    folder = resource_folder("recipes")
    found = (path.relative_to(folder).with_suffix("") for path in folder.rglob("*.yaml"))
    return sorted(path.as_posix() for path in found if path.parts[0] != "accelerate")


def recipe_path(name: str) -> Path:
    """
    Path of a recipe: a file, or the name of one that ships with the package.

    Raises:
        FileNotFoundError: there is neither.
    """
    given = Path(name)
    if given.is_file():
        return given
    shipped = resource_folder("recipes") / f"{name.removesuffix('.yaml').removeprefix('recipes/')}.yaml"
    if shipped.is_file():
        return shipped
    raise FileNotFoundError(
        f"The recipe {name!r} is neither a file nor one that ships with echo_trainer. It has: "
        f"{', '.join(available_recipes())}."
    )
