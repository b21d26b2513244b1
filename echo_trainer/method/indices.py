"""Records of index tensors, made on the host, that travel to a device in one copy."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes; every dtype can be viewed at a multiple of it."""


@dataclass(frozen=True)
class Indices:
    """A record of tensors, of such records, and of tuples and dicts of them, that moves to a device in one call."""

    def to(self, device: torch.device | str):
        """
        The same record with every tensor on `device`.

        To a device of its own they go as one buffer in pinned memory, so that nobody waits, and are views of one
        buffer there.
        """
        device = torch.device(device)
        tensors = [x for x in _tensors(self) if x.device != device]
        if not tensors:
            return self
        moved = dict(zip(map(id, tensors), together(tensors, device), strict=True))
        return _replaced(self, moved)


def together(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Copies of host tensors on `device`, all sent at once."""
    sizes = [x.numel() * x.element_size() for x in tensors]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
    buffer = torch.empty(starts.pop(), dtype=torch.uint8, pin_memory=device.type == "cuda")
    spans = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    for x, span in zip(tensors, spans, strict=True):
        buffer[span].view(x.dtype).view(x.shape).copy_(x)
    sent = buffer.to(device, non_blocking=True)
    return [sent[span].view(x.dtype).view(x.shape) for x, span in zip(tensors, spans, strict=True)]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Indices):
        for item in fields(value):
            yield from _tensors(getattr(value, item.name))
    elif isinstance(value, tuple | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)


def _replaced(value: Any, moved: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return moved.get(id(value), value)
    if isinstance(value, Indices):
        return replace(value, **{item.name: _replaced(getattr(value, item.name), moved) for item in fields(value)})
    if isinstance(value, dict):
        return {name: _replaced(each, moved) for name, each in value.items()}
    return tuple(_replaced(each, moved) for each in value) if isinstance(value, tuple) else value
