"""Keys and values of the prefixes computed again, from what the layers were given in the plain pass.

Shapes: B rows, T tokens, F = B*T, d hidden size, H key-value heads, h head size; n prefix tokens of a part.

With gradient checkpointing a layer's input is kept for backward and its keys and values are not. So for a pass over
suffixes they need not be kept either: inside the checkpoint of the echo pass a layer runs once more on the prefix
tokens of its plain input, up to where it offers their keys and values to its cache. Tokens do not see each other
before that point; where they do in some family, the proof at the first step finds another result.

What keys and values do not depend on (the projection of the queries) is left out. It is not looked up by name: in the
proof each linear map of a layer gives NaN once, and where the keys and values stay what they are it is not needed.

Private: what `compat.cache` says of caches, and that a layer's arguments hold (B, T, ...) or (1, T, ...) tensors where
they are about tokens (rotary embeddings, positions), as seen in transformers 5.23 and 5.24.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from ..method.layouts import SuffixPart
from ..method.rows import take_rows
from .cache import CachePlace, NoCacheError, NoStates, cache_given
from .checkpointing import attributes, not_checkpointed


class KeyValueReplay:
    """
    What the layers were given in the plain pass, and the keys and values that follow from it.

    Args:
        parts: say where the prefixes are.
        shape: (B, T).
        layers: the decoder layers.
        place: where they take a cache.
        first_layer: layers below it are not watched.
        unneeded: names of modules in a layer that keys and values do not depend on; None to find them at first.
    """

    def __init__(
        self,
        parts: Sequence[SuffixPart],
        shape: tuple[int, int],
        layers: nn.ModuleList,
        place: CachePlace,
        first_layer: int,
        unneeded: list[str] | None = None,
    ):
        self.parts, self.shape, self.layers, self.place = parts, shape, layers, place
        self.first_layer = first_layer
        self.unneeded = unneeded
        self.calls: dict[int, tuple[tuple, dict[str, Any]]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note the arguments of the layers in the plain pass inside."""

        def note(index: int):
            def hook(module, args, kwargs):
                self.calls[index] = (args, kwargs)

            return hook

        with ExitStack() as stack:
            for index in range(self.first_layer, len(self.layers)):
                stack.callback(self.layers[index].register_forward_pre_hook(note(index), with_kwargs=True).remove)
            yield

    def of(self, layer_idx: int, part: int) -> tuple[Tensor, Tensor]:
        """
        Keys and values (n, H, h) of the prefixes of a part, with their graph back to the layer's input.

        Raises:
            NoCacheError: the layer offers none.
        """
        if layer_idx not in self.calls:
            raise NoCacheError(f"layer {layer_idx} was not seen in the plain pass")
        prefix_n = self.parts[part].prefix_n
        # A part may have no prefix, and not every layer runs on no token: on some token then, which is left out.
        at_n = prefix_n if len(prefix_n) else self.parts[part].token_RA[0, :1]
        args, kwargs = (self._at_tokens(value, at_n) for value in self.calls[layer_idx])
        args, kwargs = cache_given(_Offer(), self.place, args, kwargs)
        layer = self.layers[layer_idx]
        if self.unneeded is None:
            self.unneeded = _unneeded(layer, args, kwargs)
        with ExitStack() as stack:
            for name in self.unneeded:
                module = layer.get_submodule(name)
                stack.enter_context(attributes(module, forward=_Constant(module, 0.0)))
            keys, values = _keys_and_values(layer, args, kwargs)
        return keys[: len(prefix_n)], values[: len(prefix_n)]

    def _at_tokens(self, value: Any, at_n: Tensor) -> Any:
        """Arguments of a layer for some tokens only, as one row: (1, n, ...) of (B, T, ...) and of (1, T, ...)."""
        if isinstance(value, tuple | list):
            return tuple(self._at_tokens(each, at_n) for each in value)
        if isinstance(value, dict):
            return {name: self._at_tokens(each, at_n) for name, each in value.items()}
        if not isinstance(value, Tensor):
            return value
        at_n = at_n.to(value.device)
        if tuple(value.shape[:2]) == tuple(self.shape):
            return take_rows(value, at_n)[None]
        if tuple(value.shape[:2]) == (1, self.shape[1]):
            return value.index_select(1, at_n % self.shape[1])
        return value


def _keys_and_values(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What a layer offers to the cache among its arguments."""
    # Not called as a module: hooks on it, an engine's too, have run for the echo pass of this layer.
    with not_checkpointed(layer):
        try:
            layer.forward(*args, **kwargs)
        except _Enough as enough:
            return enough.keys, enough.values
    raise NoCacheError(f"{type(layer).__name__} offers no keys and values to a cache")


@torch.no_grad()
def _unneeded(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[str]:
    """Names of the linear maps that a layer's keys and values do not depend on, outermost where one holds another."""
    expected = _keys_and_values(layer, args, kwargs)
    found: list[str] = []
    for name, module in layer.named_modules():
        if not hasattr(module, "out_features") or any(name.startswith(f"{outer}.") for outer in found):
            continue
        nan = _Constant(module, torch.nan)
        with attributes(module, forward=nan):
            states = _keys_and_values(layer, args, kwargs)
        if nan.calls and all(map(torch.equal, states, expected)):
            found.append(name)
    return found


class _Constant:
    """In place of the forward of a linear map: the same number everywhere."""

    def __init__(self, module: Any, value: float):
        self.module, self.value, self.calls = module, value, 0

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return x.new_full((1,), self.value).expand(*x.shape[:-1], self.module.out_features)


class _Enough(Exception):
    """The keys and values are there; what a layer does with them is not wanted."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values = keys, values


class _Offer(Cache):
    """Takes the keys and values that a layer offers, and ends its run."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.layers = NoStates()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """(1, H, n, h) keys and values."""
        raise _Enough(*(states[0].transpose(0, 1) for states in (key_states, value_states)))
