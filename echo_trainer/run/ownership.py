"""
Which part of each input belongs to which row: per row, per image, per token, or shared by all. Host side.

An input is read by what it means, not by its shape alone: with three rows and three images among them `pixel_values`
of shape (3, ...) may be one entry for each row or one for each image. What it means is seen by collating rows alone:
what a row has there is its own part, compared value by value. That is asked once, on the first rows of the training
set (`Ownership.learn`); afterwards counting the images of the rows is enough, and a batch in which two readings that
are left differ is asked itself. An input whose parts are not found makes the whole batch run.

What a batch says is kept for that batch alone. Which batches a worker of the data loader sees depends on how many
workers there are, and a resumed run does not see the first ones: a training may depend on neither.

Shapes: B rows; an input has N entries along its axis, of which row i owns n_i in the order of the rows.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..method.layouts import Pick

Lengths = tuple[int, ...]
Part = tuple[int, Lengths] | None
"""Axis, and the entries n_i of each row; None where an input is shared."""


@dataclass(frozen=True)
class Owned:
    """
    The parts of a batch.

    Attributes:
        parts: by input; inputs that are shared by all rows are left out.
        images: images of each row.
    """

    parts: dict[str, tuple[int, Lengths]]
    images: Lengths

    def picks(self, rows: Sequence[int]) -> dict[str, Pick]:
        """What the given rows own of each input."""
        return {name: Pick(_entries(lengths, rows), axis) for name, (axis, lengths) in self.parts.items()}


class Ownership:
    """
    What is known about the inputs of a run; the same in every worker of the data loader.

    Args:
        collator: of the batches.
    """

    def __init__(self, collator: Callable[[list[Any]], Mapping[str, Any]]):
        self.collator = collator
        self.readings: dict[str, set[str]] = {}

    def learn(self, rows: Sequence[Any], names_of: Callable[[dict[str, Any]], Sequence[str]]) -> None:
        """
        Ask what the inputs mean, once for the run, before a batch is loaded.

        Args:
            rows: the first of the training set; a few that differ in their images are collated.
            names_of: the inputs of a batch that are not text.
        """
        examples = _telling(rows)
        if len(examples) < 2 or not any(map(_count, examples)):
            return
        try:
            with _same_random_numbers():
                batch = dict(self.collator([copy_of(example) for example in examples]))
        except Exception:  # of the user's collator, or of rows that no batch would hold together: batches are asked
            return
        images, alone = tuple(map(_count, examples)), self._alone(examples)
        if alone is None or len(batch["input_ids"]) != len(examples):
            return
        for name in names_of(batch):
            if isinstance(batch[name], Tensor):
                self.readings[name] = self._right(name, batch, images, alone)

    def of(self, batch: dict[str, Any], examples: Sequence[Any], names: Sequence[str]) -> Owned | None:
        """
        The parts of a batch; None where some are not known.

        Args:
            batch: as collated.
            examples: its rows, as they were before they were collated.
            names: its inputs that are not text.
        """
        images = tuple(_count(example) for example in examples)
        if len(examples) != len(batch["input_ids"]) or not all(isinstance(batch[name], Tensor) for name in names):
            return None
        if len(examples) == 1:
            return Owned({}, images)
        alone: list[Mapping[str, Any]] | None = None
        certain: dict[str, Part] = {}
        for name in names:
            found = _readings(name, batch, images)
            parts = {part for reading, part in found.items() if reading in self.readings.get(name, ())}
            # Where nobody says how many images a row has, one for each here may be another number in the next batch.
            unsaid = not any(images) and not _per_token(batch[name], batch["input_ids"])
            if unsaid or len(parts) != 1:
                alone = self._alone(examples) if alone is None else alone
                if alone is None:
                    return None
                right = self._right(name, batch, images, alone)
                parts = {found[reading] for reading in (right & self.readings.get(name, right) or right)}
            if len(parts) != 1:
                return None
            certain[name] = parts.pop()
        return Owned({name: part for name, part in certain.items() if part is not None}, images)

    @staticmethod
    def _right(name: str, batch: dict[str, Any], images: Lengths, alone: list[Mapping[str, Any]]) -> set[str]:
        """The readings of an input that agree with what its rows have alone."""
        found = _readings(name, batch, images).items()
        return {reading for reading, part in found if _agrees(part, batch[name], alone, name, images)}

    def _alone(self, examples: Sequence[Any]) -> list[Mapping[str, Any]] | None:
        """Each row collated alone; None where the collator cannot do that."""
        try:
            with _same_random_numbers():
                return [self.collator([copy_of(example)]) for example in examples]
        except Exception:  # of the user's collator; then all rows run, which is right for every batch
            return None


def _telling(rows: Sequence[Any]) -> list[Any]:
    """Up to four rows, in their order, that differ in how many images they have as far as there are such."""
    counts = [_count(row) for row in rows]
    first = [counts.index(count) for count in dict.fromkeys(counts)]
    others = [i for i in range(len(rows)) if i not in first]
    return [rows[i] for i in sorted([*first, *others][:4])]


def copy_of(example: Any) -> Any:
    """An example that a collator may change."""
    return dict(example) if isinstance(example, Mapping) else example


def _per_token(value: Tensor, input_ids: Tensor) -> bool:
    """Whether an input has an entry for each token."""
    return value.shape[:2] == input_ids.shape


def _count(example: Any) -> int:
    """Images of a row, in the columns in which TRL looks for them."""
    if not isinstance(example, Mapping):
        return 0
    images = example.get("images")
    if images is not None:
        return len(images) if isinstance(images, Sequence) else 1
    return int(example.get("image") is not None)


def _readings(name: str, batch: dict[str, Any], images: Lengths) -> dict[str, Part]:
    """What an input can mean in a batch, by its shape: by the name of the reading, the part of each row."""
    value, rows = batch[name], len(images)
    found: dict[str, Part] = {"shared": None}
    for axis in range(min(value.dim(), 2)):
        if value.shape[axis] == rows:
            found[f"row {axis}"] = axis, (1,) * rows
    entries = value.shape[0] if value.dim() else 0
    if entries and entries == sum(images):
        found["image"] = 0, images
    for other, grid in batch.items():
        if not isinstance(grid, Tensor) or grid.dim() != 2 or grid.is_floating_point() or len(grid) != sum(images):
            continue
        patches = grid.prod(-1).tolist()
        if entries and entries == sum(patches):
            found[f"patch {other}"] = 0, tuple(sum(patches[a:b]) for a, b in pairwise([0, *accumulate(images)]))
    return found


def _agrees(part: Part, value: Tensor, alone: list[Mapping[str, Any]], name: str, images: Lengths) -> bool:
    """Whether each row has alone what a reading gives it in the batch."""
    if part is None:
        own = [row.get(name) for row in alone]
        return all(isinstance(found, Tensor) and torch.equal(found, value) for found in own)
    axis, lengths = part
    for (begin, end), row, count in zip(pairwise([0, *accumulate(lengths)]), alone, images, strict=True):
        own = row.get(name)
        if own is None:  # without an image a row has nothing, or a place that was filled for the sake of others
            if count or not sum(images):
                return False
        elif not isinstance(own, Tensor) or not _same(value.narrow(axis, begin, end - begin), own, axis):
            return False
    return True


def _same(part: Tensor, own: Tensor, axis: int) -> bool:
    """Whether two tensors are equal, padding aside, which may stand on either side of each axis but `axis`."""
    if part.dim() != own.dim() or part.shape[axis] != own.shape[axis] or part.dtype != own.dtype:
        return False
    if any(have < want for have, want in zip(part.shape, own.shape, strict=True)):
        return False
    first = tuple(slice(0, n) for n in own.shape)
    last = tuple(slice(have - n, have) for have, n in zip(part.shape, own.shape, strict=True))
    return torch.equal(part[first], own) or torch.equal(part[last], own)


def _entries(lengths: Lengths, rows: Sequence[int]) -> Tensor:
    """Indices of the entries that rows own, int64."""
    bounds = list(pairwise([0, *accumulate(lengths)]))
    return torch.tensor([entry for row in rows for entry in range(*bounds[row])], dtype=torch.int64)


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Whatever is drawn inside, the numbers after it are those that would have come without it."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
