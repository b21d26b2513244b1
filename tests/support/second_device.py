"""A second device made of CPU memory: tensors that say they are elsewhere, and do not mix with those that are here.

    with second_device():
        x = torch.ones(2, device=ELSEWHERE)     # real values
        x + torch.ones(2)                       # RuntimeError, as between two accelerators
        x.cpu() + torch.ones(2)                 # a copy

The name of the device is "meta", which every build of torch knows; nothing else of meta tensors is used.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

ELSEWHERE = torch.device("meta")

aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}


class Placed(torch.Tensor):
    """A tensor elsewhere; `values` holds what it computes with."""

    @staticmethod
    def __new__(cls, values: torch.Tensor):
        placed = torch.Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            layout=values.layout, device=ELSEWHERE,
        )  # fmt: skip
        placed.values = values
        return placed

    def __repr__(self, **_: Any) -> str:
        return f"Placed({self.values})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class _Elsewhere(TorchDispatchMode):
    """Sees what is made elsewhere from nothing, or sent there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the values, where its tensors are."""
    args, kwargs = tree_map(_placed, args), tree_map(_placed, kwargs)
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    placed = [x for x in tensors if isinstance(x, Placed)]
    named = kwargs.get("device")
    if func not in COPIES and placed:
        here = [x for x in tensors if not isinstance(x, Placed) and x.dim() > 0]
        if here:
            raise RuntimeError(f"{func} was given tensors of two devices: {[tuple(x.shape) for x in tensors]}")
    away = torch.device(named).type == ELSEWHERE.type if named is not None else bool(placed)
    if func is aten.copy_.default:
        away = isinstance(args[0], Placed)
    if named is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    by_values = {id(x.values): x for x in placed}
    result = func(*tree_map(_values, args), **tree_map(_values, kwargs))
    if func is aten._to_copy.default and placed and result.data_ptr() == placed[0].values.data_ptr():
        result = result.clone()
    if not away:
        return result

    def placed_again(x: Any) -> Any:
        known = by_values.get(id(x))  # what was changed in place
        return known if known is not None else Placed(x) if isinstance(x, torch.Tensor) else x

    return tree_map(placed_again, result)


def _placed(x: Any) -> Any:
    """What `torch.tensor([], device=ELSEWHERE)` makes, for which torch asks nobody."""
    if not isinstance(x, torch.Tensor) or isinstance(x, Placed) or not x.is_meta:
        return x
    if x.numel():
        raise RuntimeError(f"a tensor of shape {tuple(x.shape)} was made elsewhere without its values")
    return Placed(torch.empty(x.shape, dtype=x.dtype))


def _values(x: Any) -> Any:
    return x.values if isinstance(x, Placed) else x


class _Generator(torch.Generator):
    """Random numbers for the second device; they are drawn here."""

    def __new__(cls, device: Any = "cpu"):
        return super().__new__(cls, "cpu")


@contextmanager
def second_device() -> Iterator[None]:
    """Inside, there is a second device."""
    generator = torch.Generator
    torch.Generator = _Generator
    try:
        with _Elsewhere():
            yield
    finally:
        torch.Generator = generator
