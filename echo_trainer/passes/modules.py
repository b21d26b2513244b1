"""Give a module another forward for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    """
    Let `module` run `forward` in place of its own; hooks on it run as ever.

    A forward that someone else has put on the module (accelerate does, to place it) is back afterwards.
    """
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
