"""Bytes counted by watching every operation: exact, and the same on every machine."""

from typing import Any

from torch import Tensor

from ..compat.dispatch import StorageWeakRef, TorchDispatchMode, tree_leaves


class CountedBytes(TorchDispatchMode):
    """
    Inside, counts the memory of tensors that operations make, for as long as somebody holds it.

    What was there before is not counted, nor is what a kernel needs within itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}  # by address
        self._bound = 0  # at most so many bytes are held
        self._peak = 0

    @property
    def held(self) -> int:
        """Bytes held now."""
        self._held = {at: (storage, size) for at, (storage, size) in self._held.items() if not storage.expired()}
        self._bound = sum(size for _, size in self._held.values())
        return self._bound

    @property
    def peak(self) -> int:
        """Most bytes held at a time so far."""
        if self._bound > self._peak:
            self._peak = max(self._peak, self.held)
        return self._peak

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        before = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in before:
                self._count(x)
        self.peak  # noqa: B018
        return result

    def _count(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        at, size = storage.data_ptr(), storage.nbytes()
        if at in self._held and not self._held[at][0].expired():  # a view of what was counted
            return
        self._held[at] = (StorageWeakRef(storage), size)
        self._bound += size
