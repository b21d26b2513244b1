"""Gradient checkpointing of decoder layers: what a layer's forward depends on must be there when it is replayed.

Non-reentrant checkpointing computes a layer again during backward, when the forward pass and everything it set up are
long gone. What a layer's forward depends on must therefore travel with the checkpointed function.

Private: `_gradient_checkpointing_func`, by which transformers' `GradientCheckpointingLayer` checkpoints its forward
(seen in transformers 5.23 and 5.24), since no public hook is called at the replay; `_can_checkpoint_with_cache`, which
lets a checkpointed layer keep a cache that is only read (5.23, 5.24). `require_replay` tries both on a layer of its
own when a trainer is built, and ends with an error by name where one of them does not do its work any more.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


@contextmanager
def within_recompute(layer: nn.Module, context: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """
    Run `layer`'s forward inside `context()`, now and whenever checkpointing replays it or a part of it.

    Args:
        layer: a decoder layer (`GradientCheckpointingLayer` of transformers).
        context: makes a fresh context manager for each run.
    """
    once = _once(context)
    with ExitStack() as stack:
        parts = [part for part in _checkpointed(layer) if part.training and part.gradient_checkpointing]
        if layer not in parts:
            stack.enter_context(once())
        for part in parts:
            stack.enter_context(_replayed_within(part, once))
        yield


def _once(context: Callable[[], AbstractContextManager]) -> Callable[[], AbstractContextManager]:
    """`context` that is entered by the outermost of several runs inside each other."""
    running = 0

    @contextmanager
    def enter() -> Iterator[None]:
        nonlocal running
        running += 1
        try:
            with context() if running == 1 else nullcontext():
                yield
        finally:
            running -= 1

    return enter


def is_checkpointed(layer: nn.Module) -> bool:
    """Whether a layer keeps only its input for backward, in training."""
    return isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing


@contextmanager
def checkpointed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """
    Inside, layers keep only their input for backward, as with gradient checkpointing.

    Raises:
        TypeError: a layer is not checkpointed by transformers.
    """
    strange = {type(layer).__name__ for layer in layers if not isinstance(layer, GradientCheckpointingLayer)}
    if strange:
        raise TypeError(f"{', '.join(sorted(strange))} is no GradientCheckpointingLayer and cannot be computed again")
    with ExitStack() as stack:
        for layer in layers:
            if not is_checkpointed(layer):
                stack.enter_context(attributes(layer, gradient_checkpointing=True, _gradient_checkpointing_func=_run))
        yield


def _run(forward: Callable, *args: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False)


@contextmanager
def not_checkpointed(layer: nn.Module) -> Iterator[None]:
    """Inside, nothing of a layer is checkpointed: it is a part of something that is."""
    with ExitStack() as stack:
        for part in _checkpointed(layer):
            stack.enter_context(attributes(part, gradient_checkpointing=False))
        yield


@contextmanager
def attributes(module: nn.Module, **values: Any) -> Iterator[None]:
    """Give a module attributes for a while."""
    before = {name: vars(module)[name] for name in values if name in vars(module)}
    vars(module).update(values)
    try:
        yield
    finally:
        for name in values:
            del vars(module)[name]
        vars(module).update(before)


@contextmanager
def _replayed_within(part: Any, context: Callable[[], AbstractContextManager]) -> Iterator[None]:
    run = part._gradient_checkpointing_func

    def checkpoint_within(forward, *args, **kwargs):
        def forward_within(*inner_args, **inner_kwargs):
            with context():
                return forward(*inner_args, **inner_kwargs)

        return run(forward_within, *args, **kwargs)

    part._gradient_checkpointing_func = checkpoint_within
    try:
        yield
    finally:
        part._gradient_checkpointing_func = run


@contextmanager
def cache_kept(layer: nn.Module) -> Iterator[None]:
    """Let a checkpointed layer keep its cache, which is taken from it for fear of a second update; ours mind none."""

    @contextmanager
    def keeping() -> Iterator[None]:
        parts = _checkpointed(layer)
        for part in parts:
            part._can_checkpoint_with_cache = True
        try:
            yield
        finally:
            for part in parts:
                del part._can_checkpoint_with_cache

    # A layer is asked before it is checkpointed, a layer inside it again when that one is replayed.
    once = _once(keeping)
    with once(), within_recompute(layer, once):
        yield


_parts: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()  # weak: a layer is a part of itself


def _checkpointed(layer: nn.Module) -> list[Any]:
    """What transformers may checkpoint of a layer: itself, and layers inside it (the shared block of Zamba2)."""
    if layer not in _parts:
        _parts[layer] = WeakSet(part for part in layer.modules() if isinstance(part, GradientCheckpointingLayer))
    return list(_parts[layer])


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
    """A layer that notes, each time it runs, whether its context and its caches are there; it may hold another one."""

    def __init__(self, inner: "_Probe | None" = None) -> None:
        super().__init__()
        self.inner = inner
        self.inside: list[bool] = []  # entries of the context under way
        self.runs: list[tuple[int, int]] = []  # what each run saw

    def forward(self, hidden_states: Tensor, cache=None, past_key_values=None, layer_past=None) -> Tensor:
        caches = {"cache": cache, "past_key_values": past_key_values, "layer_past": layer_past}
        self.runs.append((len(self.inside), sum(value is not None for value in caches.values())))
        hidden_states = hidden_states * hidden_states
        return hidden_states if self.inner is None else self.inner(hidden_states, **caches)


def _replays() -> bool:
    """Whether checkpointed layers, one inside the other, run again, each time in the context and with their caches."""
    inner = _Probe()
    layer = _Probe(inner).train()
    inner.inside = layer.inside

    part: Any
    for part in (layer, inner):
        part.gradient_checkpointing, part._gradient_checkpointing_func = True, _run

    @contextmanager
    def inside() -> Iterator[None]:
        layer.inside.append(True)
        try:
            yield
        finally:
            layer.inside.pop()

    x = torch.ones(1, requires_grad=True)
    names = ("cache", "past_key_values", "layer_past")
    with torch.enable_grad(), cache_kept(layer), within_recompute(layer, inside):
        y = layer(x, **dict.fromkeys(names, object()))
    y.backward()
    return len(layer.runs) > 1 and len(inner.runs) > 1 and set(layer.runs + inner.runs) == {(1, len(names))}
