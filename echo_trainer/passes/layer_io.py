"""What goes into a decoder layer and comes out of it, whatever form its family gives it.

Shapes: B rows, T tokens, d hidden size. Most layers take and return (B, T, d). Some return it in a tuple or a list
(Bloom, OpenAI GPT), some carry several planes of it, (planes, B, T, d) (Gemma 3n); the first plane is the one that the
model predicts from.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn


def hidden_of(output: Any) -> Float[Tensor, "..."]:
    """The hidden states in what a layer returned."""
    return output[0] if isinstance(output, tuple | list) else output


def like(output: Any, hidden: Float[Tensor, "..."]) -> Any:
    """`hidden` in the form in which a layer returned `output`; what else it returned is left out (None)."""
    if isinstance(output, tuple | list):
        return type(output)([hidden, *[None] * (len(output) - 1)])
    return hidden


def form_of(output: Any) -> Any:
    """The form of what a layer returned, without its tensors, for `like`."""
    return type(output)([None] * len(output)) if isinstance(output, tuple | list) else None


def input_of(args: tuple, kwargs: dict[str, Any]) -> Float[Tensor, "..."]:
    """The hidden states among the arguments of a layer."""
    return args[0] if args else kwargs["hidden_states"]


def with_input(args: tuple, kwargs: dict[str, Any], hidden: Float[Tensor, "..."]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a layer with other hidden states."""
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}


def tokens_first(hidden: Float[Tensor, "..."], shape: tuple[int, int]) -> Float[Tensor, "B T *planes d"]:
    """
    Hidden states with rows and tokens as their first two dimensions: (B, T, d), or (B, T, planes, d).

    Args:
        hidden: (B, T, d), (planes, B, T, d), or flattened (B*T, d).
        shape: (B, T).

    Raises:
        ValueError: `hidden` has none of these shapes.
    """
    if tuple(hidden.shape[1:3]) == tuple(shape) and hidden.dim() == 4:
        return hidden.movedim(0, 2)
    if tuple(hidden.shape[:2]) == tuple(shape):
        return hidden
    if hidden.dim() == 2 and len(hidden) == shape[0] * shape[1]:
        return hidden.view(*shape, -1)
    raise ValueError(
        f"A decoder layer handed on hidden states of shape {tuple(hidden.shape)} for {shape[0]} rows of {shape[1]} "
        f"tokens, so which state belongs to which token is not known."
    )


def planes_first(states: Float[Tensor, "R A *planes d"]) -> Float[Tensor, "*planes R A d"]:
    """The inverse of `tokens_first` for states that were taken at some tokens: (R, A, d) or (planes, R, A, d)."""
    return states.movedim(2, 0) if states.dim() == 4 else states


def first_plane(states: Float[Tensor, "G *planes d"]) -> Float[Tensor, "G d"]:
    """(G, d) of states (G, d) or (G, planes, d): those the model predicts from."""
    return states[:, 0] if states.dim() == 3 else states


@contextmanager
def forward_hook(module: nn.Module, hook: Callable) -> Iterator[None]:
    """A hook on the outputs of a module, for a while."""
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def input_hook(module: nn.Module, hook: Callable) -> Iterator[None]:
    """A hook on the arguments of a module, `hook(module, args, kwargs)`, for a while."""
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
