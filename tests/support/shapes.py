"""Shapes and types of `method` and `passes` are checked at every call of a test; not in use."""

from collections.abc import Callable

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

CHECKED = ("echo_trainer.method", "echo_trainer.passes")

_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # a whole number is a float, as for a type checker


def typechecker(function: Callable) -> Callable:
    """A function that checks its arguments and its result; one inside another is made anew too often to be checked."""
    return function if "<locals>" in function.__qualname__ else _checked(function)


def check_calls() -> None:
    """Check from now on; before anything of the package is imported."""
    install_import_hook(CHECKED, f"{__name__}.typechecker")
