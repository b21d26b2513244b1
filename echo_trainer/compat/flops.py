"""Floating-point operations of everything that runs, attention on a CPU included.

Private: `flop_registry` of `torch.utils.flop_counter` (seen in torch 2.13), torch's formulas by operation, and the
names of the operations that compute attention on a CPU. torch has formulas for attention on accelerators only and
counts nothing for a fused kernel on a CPU. Without the registry the import fails by name.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Size
from torch.utils.flop_counter import FlopCounterMode

from .dispatch import TorchDispatchMode


def _forward(query: Size, key: Size, value: Size, *args: Any, **kwargs: Any) -> int:
    """Scores, and their sum over the values: (b, heads, queries, size), (b, key heads, keys, size)."""
    rows, heads, n_queries, size = query
    return 2 * rows * heads * n_queries * key[2] * (size + value[3])


def _backward(gradient: Size, query: Size, key: Size, value: Size, *args: Any, **kwargs: Any) -> int:
    """The scores again, and the gradients of scores, queries, keys and values, as torch counts other kernels."""
    rows, heads, n_queries, size = query
    return 2 * rows * heads * n_queries * key[2] * (3 * size + 2 * value[3])


_CPU_ATTENTION: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}


def flop_counter() -> FlopCounterMode:
    """torch's counter, which also knows attention on a CPU; pairs that a mask hides are counted, as on a GPU."""
    return FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)


class FastFlopCounter(TorchDispatchMode):
    """
    Sums the same formulas over the operations that run.

    `FlopCounterMode` counts by module as well, for which it wraps every module in every call: several times slower.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self._formulas = flop_counter().flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = self._formulas.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=result)
        return result
