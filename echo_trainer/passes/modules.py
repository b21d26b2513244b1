"""The transformers model inside an adapted one; another forward for a module, for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def base_model_of(model: Any) -> PreTrainedModel:
    """The transformers model inside a `PeftModel`; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


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
