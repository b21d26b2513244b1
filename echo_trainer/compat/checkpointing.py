"""Gradient checkpointing of decoder layers: what a layer's forward depends on must be there when it is replayed.

Non-reentrant checkpointing computes a layer again during backward, when the forward pass and everything it set up are
long gone. What a layer's forward depends on must therefore travel with the checkpointed function.

Private: `_gradient_checkpointing_func`, by which transformers' `GradientCheckpointingLayer` checkpoints its forward
(seen in transformers 5.23 and 5.24), since no public hook is called at the replay; `_can_checkpoint_with_cache`, which
lets a checkpointed layer keep a cache that is only read (5.23, 5.24). `require_replay` tries both on a layer of its
own when a trainer is built, and ends with an error by name where one of them does not do its work any more.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer


@contextmanager
def within_recompute(layer: nn.Module, context: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """
    Run `layer`'s forward inside `context()`, now and whenever checkpointing replays it.

    Args:
        layer: a decoder layer (`GradientCheckpointingLayer` of transformers).
        context: makes a fresh context manager for each run.
    """
    if not (layer.training and getattr(layer, "gradient_checkpointing", False)):
        with context():
            yield
        return
    checkpoint = layer._gradient_checkpointing_func

    def checkpoint_within(forward, *args, **kwargs):
        def forward_within(*inner_args, **inner_kwargs):
            with context():
                return forward(*inner_args, **inner_kwargs)

        return checkpoint(forward_within, *args, **kwargs)

    layer._gradient_checkpointing_func = checkpoint_within
    try:
        yield
    finally:
        layer._gradient_checkpointing_func = checkpoint


@contextmanager
def cache_kept(layer: nn.Module) -> Iterator[None]:
    """Let a checkpointed layer keep its cache, which is taken from it for fear of a second update; ours mind none."""
    layer._can_checkpoint_with_cache = True
    try:
        yield
    finally:
        del layer._can_checkpoint_with_cache


def require_replay(layers: nn.ModuleList) -> None:
    """
    Make sure that these layers, checkpointed, are replayed with what was set up for them.

    Tried on a small layer of the same base class, forward and backward, in microseconds.

    Args:
        layers: the decoder layers of a model that is to be trained with gradient checkpointing.

    Raises:
        ValueError: they are checkpointed in a way this package does not know, so gradients would be silently wrong.
    """
    strange = sorted({type(layer).__name__ for layer in layers if not isinstance(layer, GradientCheckpointingLayer)})
    if strange:
        raise ValueError(
            f"gradient_checkpointing=True, and the decoder layers ({', '.join(strange)}) are not checkpointed by "
            f"transformers' GradientCheckpointingLayer, so what the echo adds would be missing when they are computed "
            f"again: the gradients would be wrong without a word. Set gradient_checkpointing=False."
        )
    try:
        works = _replays()
    except (AttributeError, TypeError) as error:
        works, why = False, f" ({error})"
    else:
        why = ""
    if not works:
        raise ValueError(
            f"transformers {transformers.__version__} checkpoints decoder layers in another way than this version of "
            f"echo_trainer knows{why}, so the echo would be missing when they are computed again. Set "
            f"gradient_checkpointing=False, or install the tested versions (`echo-trainer env` names them)."
        )


class _Probe(GradientCheckpointingLayer):
    """A layer that notes whether its cache and its context are there."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.runs = False, []

    def forward(self, hidden_states: Tensor, cache=None, past_key_values=None, layer_past=None) -> Tensor:
        given = [x for x in (cache, past_key_values, layer_past) if x is not None]
        self.runs.append((self.inside, len(given)))
        return hidden_states * hidden_states


def _replays() -> bool:
    """Whether a checkpointed layer runs twice, both times in its context and with its cache."""
    layer = _Probe().train()
    layer.gradient_checkpointing = True

    def checkpoint(forward, *args):
        return torch.utils.checkpoint.checkpoint(forward, *args, use_reentrant=False)

    layer._gradient_checkpointing_func = checkpoint

    @contextmanager
    def inside() -> Iterator[None]:
        layer.inside = True
        try:
            yield
        finally:
            layer.inside = False

    x = torch.ones(1, requires_grad=True)
    names = ("cache", "past_key_values", "layer_past")
    with torch.enable_grad(), cache_kept(layer), within_recompute(layer, inside):
        y = layer(x, **dict.fromkeys(names, object()))
    y.backward()
    return layer.runs == [(True, len(names))] * 2
