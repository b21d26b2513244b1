"""The one reader of YAML recipes."""

import argparse
import os
import re
from pathlib import Path
from typing import Any

import yaml

from ..resources import resource_folder
from .find import recipe_path

_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")
_EXPONENT = re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$")


def read_recipe(path: str | Path) -> dict[str, Any]:
    """
    Read a recipe.

    `${NAME}` and `${NAME:-default}` inside a value stand for environment variables; `${QUICKSTART}` for the folder of
    the embedded base and data. A value that is nothing else is read as if it stood there without quotes, so it can be
    a number. `1e-3` is one as well (YAML 1.1 takes it for text).

    Args:
        path: the YAML file.

    Raises:
        ValueError: not YAML, no mapping, a key that stands twice, or a variable that is not set and has no default.
    """
    try:
        recipe = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except UnicodeDecodeError:
        raise ValueError(f"The recipe {path} is not text in UTF-8. Give a YAML file.") from None
    except yaml.YAMLError as error:
        hint = " Put ${...} in quotes inside {} and []." if "${" in str(error) else ""
        raise ValueError(f"The recipe {path} is not YAML: {' '.join(str(error).split())}.{hint}") from None
    except _RecipeError as error:
        raise ValueError(f"The recipe {path} {error}") from None
    except (ValueError, RecursionError) as error:  # an impossible date, a bottomless nesting
        raise ValueError(f"The recipe {path} holds a value that YAML cannot read: {error}.") from None
    if not isinstance(recipe, dict):
        found = "is empty" if recipe is None else f"holds a {type(recipe).__name__}"
        raise ValueError(f"The recipe {path} {found}. Write a mapping, one `option: value` a line.")
    return recipe


def named_recipe(arguments: list[str]) -> tuple[Path | None, dict[str, Any], list[str]]:
    """
    The recipe that `--config` names on a command line. Needs no library that takes long to load.

    Args:
        arguments: of the command.

    Returns:
        Path and content of the recipe (None and nothing where none is named), and the other arguments.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: it cannot be read, or `--config` stands alone.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", nargs="?", const="")
    found, rest = parser.parse_known_args(arguments)
    if found.config == "":
        raise ValueError("`--config` needs the name or the path of a recipe after it.")
    if found.config is None:
        return None, {}, rest
    path = recipe_path(found.config)
    return path, read_recipe(path), rest


class _RecipeError(Exception):
    """What is wrong with a recipe that is good YAML, in words that follow its name."""


class _Loader(yaml.SafeLoader):
    """YAML with variables, and without keys that stand twice."""

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        """A scalar; variables are replaced first, so that what they hold decides whether it is a number."""
        event = self.peek_event()
        if _VARIABLE.fullmatch(event.value):  # inside {} and [] YAML asks for quotes that mean nothing here
            event.implicit, event.style = (True, False), None
        event.value = _VARIABLE.sub(_value, event.value)
        return super().compose_scalar_node(anchor)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping; of two equal keys YAML would silently take the last."""
        written = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = next((key for place, key in enumerate(written) if key in written[:place]), None)
        if twice is not None:
            raise _RecipeError(f"has the key {twice!r} twice. Leave one of the lines out.")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def _value(match: re.Match) -> str:
    name, default = match.groups()
    if name == "QUICKSTART":
        return str(resource_folder("quickstart"))
    value = os.environ.get(name, default)
    if value is None:
        raise _RecipeError(f"uses ${{{name}}}, and no such environment variable is set. Set {name}.")
    return value
