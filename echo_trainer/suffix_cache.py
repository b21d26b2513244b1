"""Keys and values of the plain pass, and the cache that shows their prefixes to the suffix pass.

Shapes: B rows, T tokens, H key-value heads, h head size; R rows of P prefix and A suffix tokens.

Both objects look like a transformers `Cache` to an attention module, which calls `update` with its new keys and values
and attends to what it gets back. Neither is changed by a second call, so gradient checkpointing may replay a layer.
"""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from .layouts import SuffixLayout
from .rows import take_rows


class KeyValueRecord(Cache):
    """
    Keeps the prefixes' keys and values of the plain pass, with their graph, and hands back what it was given.

    Args:
        layout: says where the prefixes are.
        first_layer: layers below it are not recorded.
    """

    def __init__(self, layout: SuffixLayout, first_layer: int):
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.layout = layout
        self.first_layer = first_layer
        self.prefix: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Record (B, H, T, h) keys and values the first time a layer offers them."""
        if layer_idx >= self.first_layer:
            # Selected on a replay too, although only the first selection is kept: checkpointing compares what the
            # forward and its replay save for backward.
            selected = (self._prefix(key_states), self._prefix(value_states))
            self.prefix.setdefault(layer_idx, selected)
        return key_states, value_states

    def _prefix(self, states_BHTh: Tensor) -> Tensor:
        """The prefixes' rows, (R, H, P, h)."""
        return take_rows(states_BHTh.transpose(1, 2), self.layout.prefix_RP, self.layout.real_prefix).transpose(1, 2)


class PrefixCache(Cache):
    """
    A cache that already holds the prefixes and forgets what it is shown.

    Args:
        record: what the plain pass recorded.
        n_prefix: P, the length that masks and positions count from.
    """

    def __init__(self, record: KeyValueRecord, n_prefix: int):
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.record = record
        self.n_prefix = n_prefix

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """The prefix's keys and values followed by the suffix's, (R, H, P + A, h)."""
        keys, values = self.record.prefix[layer_idx]
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """P for every layer."""
        return self.n_prefix

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Column of the first suffix token."""
        return self.n_prefix

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Number of columns P + A of the mask, and the first column 0, for full and for sliding layers."""
        return self.n_prefix + query_length, 0


@contextmanager
def attach_cache(layers: nn.ModuleList, cache: Cache) -> Iterator[None]:
    """
    Give `cache` to every decoder layer, below the backbone's own handling of caches.

    In the plain pass the backbone itself must not see it: with a cache it would stop recognising packed sequences by
    their positions.
    """
    name = cache_argument(layers)
    place = _parameters(layers).index(name) - 1  # without self

    def give(module, args, kwargs):
        if len(args) > place:  # GPT-2 hands its cache over by position
            return (*args[:place], cache, *args[place + 1 :]), kwargs
        return args, {**kwargs, name: cache}

    with ExitStack() as stack:
        for layer in layers:
            # Checkpointed layers lose their cache otherwise, for fear of a second update; ours do not mind one.
            layer._can_checkpoint_with_cache = True
            stack.callback(delattr, layer, "_can_checkpoint_with_cache")
            stack.callback(layer.register_forward_pre_hook(give, with_kwargs=True).remove)
        yield


def cache_argument(layers: nn.ModuleList) -> str | None:
    """Name of the argument through which a decoder layer takes its cache, None if it takes none."""
    parameters = _parameters(layers)
    return next((name for name in ("past_key_values", "layer_past") if name in parameters), None)


def _parameters(layers: nn.ModuleList) -> list[str]:
    return list(inspect.signature(type(layers[0]).forward).parameters)
