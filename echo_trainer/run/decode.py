"""A training batch as text: what is the prompt, what is trained on, where the echo comes from, and who gets one."""

import itertools
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..method.segments import IGNORE_INDEX
from .answers import answers_of
from .draft import draw
from .host import Host


@dataclass(frozen=True)
class Part:
    """
    A run of tokens of one kind.

    Attributes:
        text: as the tokenizer decodes it, special tokens and all.
        answer: whether it is trained on.
        boundary: column of the last prompt token before it, from which its echo comes; None where there is none.
        boundary_token: that token as text.
    """

    text: str
    answer: bool
    boundary: int | None = None
    boundary_token: str = ""

    def __str__(self) -> str:
        if not self.answer:
            return f"  prompt   {self.text!r}"
        if self.boundary is None:
            return f"  answer   {self.text!r} (no prompt before it, so no echo)"
        return f"  boundary {self.boundary_token!r} (column {self.boundary})\n  answer   {self.text!r}"


@dataclass(frozen=True)
class DecodedDocument:
    """
    A document of a batch: a row, or one of the documents of a packed row.

    Attributes:
        row: row of the batch.
        parts: prompts and answers in their order.
        routed: whether it gets an echo pass; None with the echo off.
    """

    row: int
    parts: tuple[Part, ...]
    routed: bool | None

    @property
    def prompt(self) -> str:
        """The prompts, one after the other."""
        return "".join(part.text for part in self.parts if not part.answer)

    @property
    def answer(self) -> str:
        """The answers, one after the other."""
        return "".join(part.text for part in self.parts if part.answer)

    def __str__(self) -> str:
        route = {True: "gets an echo pass", False: "no echo pass this time", None: "the echo is off"}[self.routed]
        return "\n".join([f"row {self.row}: {route}", *map(str, self.parts)])


class DecodedBatch(tuple[DecodedDocument, ...]):
    """The documents of a batch; as text, one below the other."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(map(str, self))

    __repr__ = __str__


def decode(host: Host, batch: dict[str, Any] | None = None) -> DecodedBatch:
    """
    A batch as text, with the routes it gets as the first micro-batch of the next step.

    Args:
        host: the trainer.
        batch: a collated batch; None takes the first that training would see, and leaves no trace of it.

    Raises:
        ValueError: the batch has no `labels`.
    """
    batch = batch if batch is not None else _first_batch(host)
    segments, routed = answers_of(batch).segments, None
    if host.echo is not None:
        drawn = draw(batch, host.batches.schedule(), host.state.global_step, 0, host.args.echo_positions)
        routed = (drawn.routed_D & segments.routable_D.numpy()).tolist()
    return documents_of(batch, getattr(host.processing_class, "tokenizer", host.processing_class), routed)


def documents_of(batch: dict[str, Any], tokenizer: Any, routed: list[bool] | None = None) -> DecodedBatch:
    """
    The documents of a collated batch as text.

    Args:
        batch: with `labels`.
        tokenizer: that the batch was made with.
        routed: by document, whether it gets an echo pass; None with the echo off.

    Raises:
        ValueError: the batch has no `labels`.
    """
    segments = answers_of(batch).segments
    width = segments.shape[1]
    ids, labels = (batch[name].cpu().reshape(-1) for name in ("input_ids", "labels"))
    answer = labels.ne(IGNORE_INDEX) | segments.segment_F.ge(0)  # of a flat batch the first label is masked

    def part(start: int, end: int, first: int) -> Part:
        text = tokenizer.decode(ids[start:end])
        if not answer[start] or start == first:
            return Part(text, bool(answer[start]))
        return Part(text, True, (start - 1) % width, tokenizer.decode(ids[start - 1 : start]))

    documents = []
    for number, (start, end) in enumerate(zip(segments.start_D.tolist(), segments.end_D.tolist(), strict=True)):
        changes = (answer[start + 1 : end] != answer[start : end - 1]).nonzero().flatten() + start + 1
        edges = [start, *changes.tolist(), end]
        parts = tuple(part(a, b, start) for a, b in itertools.pairwise(edges))
        documents.append(DecodedDocument(start // width, parts, None if routed is None else routed[number]))
    return DecodedBatch(documents)


def _first_batch(host: Host) -> dict[str, Any]:
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            loader = host.get_train_dataloader()
            if isinstance(loader.dataset, Dataset):
                examples = [loader.dataset[place] for place in next(iter(loader.batch_sampler))]
            else:
                examples = list(itertools.islice(iter(loader.dataset), host.args.train_batch_size))
            return loader.collate_fn(examples)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
