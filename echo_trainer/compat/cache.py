"""Keys and values of the plain pass, and the cache that shows their prefixes to the suffix pass.

Shapes: B rows, T tokens, H key-value heads, h head size; R rows of P prefix and A suffix tokens, n prefix tokens of
all rows.

Both objects look like a transformers `Cache` to an attention module, which calls `update` with its new keys and values
and attends to what it gets back. Neither is changed by a second call, so gradient checkpointing may replay a layer.

Private: which questions an attention module, a mask and a backbone ask of a `Cache` (`update`, `get_seq_length`,
`get_query_offset`, `get_mask_sizes`), and how layer and backbone call the argument they take it by
(`past_key_values` up to transformers 5.23, `cache` since 5.24, `layer_past` in Bloom). The argument is not looked up
by name: `observe_cache` watches where the model itself puts a cache. What is asked is not looked up either: the proof
at the first step compares the two passes, and where a new question goes unanswered the full pass runs.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from ..method.layouts import SuffixPart
from ..method.rows import join_prefix, take_rows
from .checkpointing import cache_kept


@dataclass(frozen=True)
class CachePlace:
    """
    The arguments by which a model takes its cache.

    Attributes:
        backbone: keyword of the backbone.
        layer: keyword of the decoder layers.
        position: where it stands among the layers' positional arguments; None where it is given by keyword.
    """

    backbone: str
    layer: str
    position: int | None = None


class NoCacheError(ValueError):
    """The decoder layers of a model take no cache of keys and values."""


class CacheObserver:
    """Watches in which argument decoder layers are given a cache, while the model runs with one of its own."""

    def __init__(self, layers: nn.ModuleList):
        self.layers = layers
        self._found: set[tuple[str | None, int | None]] = set()
        self._calls = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the forwards inside the context."""
        with ExitStack() as stack:
            for layer in self.layers:
                stack.callback(layer.register_forward_pre_hook(self._look, with_kwargs=True).remove)
            yield

    def _look(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._calls += 1
        for position, value in enumerate(args):
            if isinstance(value, Cache):
                self._found.add((None, position))
        for name, value in kwargs.items():
            if isinstance(value, Cache):
                self._found.add((name, None))

    def place(self, backbone: nn.Module, outputs: Any) -> CachePlace:
        """
        Where the cache was seen.

        Args:
            backbone: the model whose forward was watched.
            outputs: what it returned, with the cache it made.

        Raises:
            NoCacheError: no layer was given one, not all alike, or the backbone does not say how it takes one.
        """
        if len(self._found) != 1:
            seen = "no cache of keys and values" if not self._found else "their caches in different ways"
            raise NoCacheError(f"the decoder layers of {type(backbone).__name__} take {seen}")
        name, position = next(iter(self._found))
        if name is None:
            assert position is not None  # a cache is found by name or by position
            name = _parameters(self.layers[0])[position]
        returned = [key for key, value in _items(outputs) if isinstance(value, Cache)]
        known = inspect.signature(backbone.forward).parameters
        taken = next((key for key in (*returned, name) if key in known), None)
        if taken is None:
            raise NoCacheError(
                f"{type(backbone).__name__} does not say by which argument it takes a cache (its layers take "
                f"{name!r}, it returns {returned})"
            )
        return CachePlace(backbone=taken, layer=name, position=position)


class NoStates(list):
    """In place of the layers of a cache: layers with a running state (linear attention, convolutions) look there."""

    def __getitem__(self, index: Any) -> Any:
        raise NoCacheError("a layer asks its cache for another state than keys and values")


class KeyValueRecord(Cache):
    """
    Keeps the prefixes' keys and values of the plain pass, with their graph, and hands back what it was given.

    Args:
        parts: say where the prefixes are.
        first_layer: layers below it are not recorded.
        whole: keep what a layer offers, which its own attention keeps for backward too, and take the prefixes out of
            it at each use. Else only the prefixes are kept.
    """

    def __init__(self, parts: Sequence[SuffixPart], first_layer: int, whole: bool = False):
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.layers = NoStates()
        self.positions = [part.prefix_n for part in parts]
        self.first_layer = first_layer
        self.whole = whole
        self.offered: dict[int, tuple[Tensor, Tensor]] = {}
        self.prefix: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Record (B, H, T, h) keys and values the first time a layer offers them."""
        if layer_idx >= self.first_layer and self.whole:
            self.offered.setdefault(layer_idx, (key_states, value_states))
        elif layer_idx >= self.first_layer:
            # Selected on a replay too, although only the first selection is kept: checkpointing compares what the
            # forward and its replay save for backward.
            selected = list(zip(self._prefixes(key_states), self._prefixes(value_states), strict=True))
            self.prefix.setdefault(layer_idx, selected)
        return key_states, value_states

    def of(self, layer_idx: int, part: int) -> tuple[Tensor, Tensor]:
        """Keys and values (n, H, h) of the prefixes of a part."""
        if layer_idx not in (self.offered if self.whole else self.prefix):
            raise NoCacheError(f"layer {layer_idx} showed no keys and values in the plain pass")
        if not self.whole:
            return self.prefix[layer_idx][part]
        keys, values = (take_rows(x.transpose(1, 2), self.positions[part]) for x in self.offered[layer_idx])
        return keys, values

    def _prefixes(self, states_BHTh: Tensor) -> tuple[Tensor, ...]:
        """Those of all parts in one go: the gradient of what they are taken from is made once."""
        states = take_rows(states_BHTh.transpose(1, 2), torch.cat(self.positions))
        return states.split([len(position) for position in self.positions])


class PrefixCache(Cache):
    """
    A cache that already holds the prefixes of a part and forgets what it is shown.

    Args:
        part: a pass over suffixes; P is the length that masks and positions count from.
        prefix: keys and values (n, H, h) of its prefixes in a layer.
    """

    def __init__(self, part: SuffixPart, prefix: Callable[[int], tuple[Tensor, Tensor]]):
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.layers = NoStates()
        self.prefix = prefix
        self.place_n = part.place_n
        self.n_prefix = part.n_prefix

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """The prefix's keys and values followed by the suffix's, (R, H, P + A, h)."""
        keys, values = self.prefix(layer_idx)
        return (
            join_prefix(keys, key_states, self.place_n, self.n_prefix),
            join_prefix(values, value_states, self.place_n, self.n_prefix),
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """P for every layer."""
        return self.n_prefix

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Column of the first suffix token."""
        return self.n_prefix

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Number of columns P + A of the mask, and the first column 0, for full and for sliding layers."""
        return self.n_prefix + query_length, 0


def cache_given(cache: Cache, place: CachePlace, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a layer with `cache` in its place."""
    if place.position is not None and len(args) > place.position:
        return (*args[: place.position], cache, *args[place.position + 1 :]), kwargs
    return args, {**kwargs, place.layer: cache}


@contextmanager
def attach_cache(layers: nn.ModuleList, cache: Cache, place: CachePlace) -> Iterator[None]:
    """
    Give `cache` to every decoder layer, below the backbone's own handling of caches.

    In the plain pass the backbone itself must not see it: with a cache it would stop recognising packed sequences by
    their positions.
    """

    def give(module, args, kwargs):
        return cache_given(cache, place, args, kwargs)

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(cache_kept(layer))
            stack.callback(layer.register_forward_pre_hook(give, with_kwargs=True).remove)
        yield


def cache_keyword(model: nn.Module) -> str:
    """
    The argument by which the forward of a model takes a cache, told from its annotation.

    Raises:
        NoCacheError: no argument is annotated as one.
    """
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if "Cache" in str(parameter.annotation):
            return name
    raise NoCacheError(f"the forward of {type(model).__name__} takes no cache of keys and values")


def _parameters(layer: nn.Module) -> list[str]:
    """Names of a layer's arguments, below whatever decorates its forward; without self."""
    names = list(inspect.signature(type(layer).forward).parameters)
    return names[1:]


def _items(outputs: Any) -> list[tuple[str, Any]]:
    return list(outputs.items()) if hasattr(outputs, "items") else []
