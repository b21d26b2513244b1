"""Come to one answer on every process, without making a device wait."""

from typing import Any

import torch
import torch.distributed as dist


class Agreement:
    """
    Talks between the processes of a run, on the host.

    A group of its own with gloo: what is exchanged are a few numbers of the host, and a collective of the device would
    wait for the step before.
    """

    def __init__(self) -> None:
        self._group: Any = None

    @property
    def alone(self) -> bool:
        """Whether there is one process only."""
        return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on some process. Every process must call it."""
        if self.alone:
            return flag
        value = torch.tensor([int(flag)])
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self._host())
        return bool(value.item())

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in their order. Every process must call it."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, value, group=self._host())
        return found

    def _host(self) -> Any:
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        return self._group
