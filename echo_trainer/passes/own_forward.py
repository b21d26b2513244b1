"""The model's own forward, as whoever uses it will call it: whether it runs, and whether our head computes its logits.

A training step runs the backbone and reads the head; it never calls the head's own forward. A model that cannot be run
would train all the same, and nobody could use what comes out.

Shapes: n tokens of a tiny row, d hidden size.
"""

from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

from .head import with_head
from .memory import is_out_of_memory
from .rounding import relative
from .setup import EchoSetup


class UnusableModelError(ValueError):
    """The model cannot be run at all."""


def own_forward(model: nn.Module, ids: Int[Tensor, "B T"]) -> Any:
    """
    What a model or its backbone returns for token ids.

    Raises:
        UnusableModelError: its forward fails.
        torch.OutOfMemoryError: there is no memory for it.
    """
    try:
        return model(input_ids=ids, use_cache=False)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        why = str(error).splitlines()[0].rstrip(".") if str(error) else "no reason given"
        raise UnusableModelError(
            f"The forward of {type(model).__name__} fails before the first step, so nobody could use what would be "
            f"trained ({type(error).__name__}: {why}). Make it run, model(input_ids=...), before you train it. A base "
            f"that ties head and embedding, for example, cannot have trainable_token_indices and a saved head at "
            f"once: take 'lm_head' out of modules_to_save."
        ) from error


def compare_heads(setup: EchoSetup, tiny_ids: Int[Tensor, "2 n"]) -> float:
    """
    Relative difference of our logits and the model's own on a tiny batch.

    Args:
        setup: the model.
        tiny_ids: int64 (2, n).

    Raises:
        UnusableModelError: the model's own forward fails.
    """
    outputs = setup.backbone(input_ids=tiny_ids, use_cache=False)
    own = own_forward(setup.model, tiny_ids).logits
    hidden_Nd = outputs.last_hidden_state.flatten(0, 1)
    ours = with_head(setup.model, setup.backbone, outputs, lambda head: head.logits(hidden_Nd))
    return relative(ours, own.reshape(ours.shape))
