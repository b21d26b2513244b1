"""Come to one answer on every process, without making a device wait; and fail together.

Much of a run is done by one process alone: it writes, publishes, pushes, reads what is resumed. An error there ends
that process, and the others wait for it at the next collective for ever. `Agreement.together` is what such a section
stands in: an error of one process is raised by all of them, with the words of the first.
"""

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Value = TypeVar("Value")

PATIENCE = timedelta(minutes=1)
"""How long a process that has failed waits for the others: they may be held up where it will never come."""

LONGEST = timedelta(hours=2)
"""How long the others wait at the end of a section; a push may take long."""

_TOLD = "told_to_every_process"  # an attribute of errors


class Agreement:
    """
    Talks between the processes of a run, on the host.

    A group of its own with gloo: what is exchanged are a few numbers of the host, and a collective of the device would
    wait for the step before. Every process must make one, and call its methods equally often.
    """

    def __init__(self) -> None:
        self._group: Any = None
        if not self.alone:
            self._host()  # now: a process that has failed should not wait for a group to form

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

    def sum(self, values: list[float]) -> list[float]:
        """Sums over the processes, exact for whole numbers up to 2**53. Every process must call it."""
        if self.alone:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self._host())
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in their order. Every process must call it."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, value, group=self._host())
        return found

    def decide(self, choose: Callable[[], Value]) -> Value:
        """
        What the main process chooses, on every process. Every process must call it; `choose` runs in the main one.

        Raises:
            Exception: what `choose` raised, on every process.
        """
        if self.alone:
            return choose()
        with self.together():
            value = choose() if dist.get_rank() == 0 else None
        return self.gather(value)[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """
        A section that succeeds on every process or on none; nobody leaves it before all have come to its end.

        Every process must enter it. A collective inside must come before what may fail on one process. Sections may
        lie in each other: what all have been told of is not told again.

        Raises:
            Exception: the error of the first process that has one, on every process.
            RuntimeError: another process never came to the end of the section.
        """
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        first = self._first(error)
        if first is not None and first is not error:
            raise first from error
        if error is not None:
            raise error

    def _first(self, error: Exception | None) -> Exception | None:
        """The error of the first process that has one."""
        if self.alone or (error is not None and _is_told(error)):
            return error
        try:
            dist.monitored_barrier(self._host(), LONGEST if error is None else PATIENCE)
        except RuntimeError as missing:
            if error is not None:
                return error
            raise RuntimeError(
                f"Another process of the run did not come to this point: it has ended, or it was not called there. "
                f"Its own output says why. train(), save_model() and push_to_hub() must be called on every process, "
                f"not on the main one alone; only that one writes. ({missing})"
            ) from missing
        found = self.gather(None if error is None else _packed(error))
        number = next((i for i, packed in enumerate(found) if packed is not None), None)
        if number is None:
            return None
        if error is not None and number == dist.get_rank():
            first = error
        else:
            first = pickle.loads(found[number])
            first.add_note(f"It happened in process {number}; every process ends with it.")
        setattr(first, _TOLD, True)
        return first

    def _host(self) -> Any:
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        return self._group


def _is_told(error: BaseException) -> bool:
    """Whether every process has been told of an error, or of one that it was made from."""
    cause: BaseException | None = error
    while cause is not None:
        if getattr(cause, _TOLD, False):
            return True
        cause = cause.__cause__
    return False


def _packed(error: Exception) -> bytes:
    """An error as other processes can read it; in words where it cannot be pickled and read again."""
    try:
        packed = pickle.dumps(error)
        pickle.loads(packed)
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return packed
