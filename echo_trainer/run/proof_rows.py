"""What the passes are compared on: at most two rows of a batch, in the batch's own layout. Host side."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..method.forms import EchoForm
from ..method.segments import IGNORE_INDEX, Segments, is_flat
from ..passes.proof import ProofTask
from .answers import Answers, backbone_inputs, find_answers
from .draft import DraftPlan, reachable_documents

ROWS = 2
DOCUMENTS = 8
"""Documents of packed rows that are routed in a proof, at most."""
TINY = 8


def proof_inputs(
    draft: DraftPlan, form: EchoForm, collator: Callable, device: torch.device | str
) -> tuple[dict[str, Any], ProofTask]:
    """
    The inputs of a proof and what to compare on them, on `device`.

    Args:
        draft: a batch of the kind that is to be proved; one that no echo reaches gives a task of no weight.
        form: of the echo pass.
        collator: that made the batch.
        device: of the model.
    """
    batch, answers = _few_rows(draft, collator)
    segments = answers.segments
    documents = _documents(segments, draft.positions)
    small = replace(draft, batch=batch, answers=answers, plans={})
    n_parts = 1 if draft.lockstep else None  # as many on every process
    # All of them, and the shortest alone: what else is in a pass must make no difference. As many on every process.
    chosen = [[d in routed for d in range(segments.n_documents)] for routed in (documents, documents[-1:])]
    plans = [small.plan_of(routed, form, lockstep=True, n_parts=n_parts) for routed in chosen]
    first, later = _first_and_later(segments, documents)
    task = ProofTask(
        form=form,
        plans=tuple(plan.to(device) for plan in plans),
        tiny_ids=_tiny_ids(batch).to(device),
        first_n=first.to(device),
        later_n=None if later is None else later.to(device),
    )
    return cast("dict[str, Any]", send_to_device(backbone_inputs(batch), device)), task


@contextmanager
def no_trace(model: nn.Module) -> Iterator[None]:
    """
    Evaluation mode without gradients inside. Afterwards the mode, the buffers and the plain attributes of every module
    are as they were (rotary embeddings remember the longest sequence they have seen), and so are all random numbers.
    """
    before = [(module, module.training, _memory_of(module)) for module in model.modules()]
    states = random.getstate(), np.random.get_state()
    device = next(model.parameters()).device
    streams: dict[str, Any] = (
        {"devices": []} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
    )
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(**streams):
            yield
    finally:
        for module, mode, memory in before:
            module.training = mode
            _remember(module, memory)
        random.setstate(states[0])
        np.random.set_state(states[1])


def _memory_of(module: nn.Module) -> dict[str, tuple[Any, Tensor | None]]:
    """Buffers and plain attributes of a module by name: the value, and a copy of it where it is a tensor."""
    found = dict(module.named_buffers(recurse=False, remove_duplicate=False))
    found |= {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and isinstance(value, Tensor | int | float | str | None)
    }
    return {
        name: (value, value.clone() if isinstance(value, Tensor) and not value.is_meta else None)
        for name, value in found.items()
        if not isinstance(value, nn.Parameter)
    }


def _remember(module: nn.Module, memory: dict[str, tuple[Any, Tensor | None]]) -> None:
    now = _memory_of(module)
    for name in now.keys() - memory.keys():
        delattr(module, name)
    for name, (value, copy) in memory.items():
        if copy is not None and not torch.equal(value, copy):
            value.copy_(copy)
        if name not in now or now[name][0] is not value:
            setattr(module, name, value)


def _few_rows(draft: DraftPlan, collator: Callable) -> tuple[dict[str, Any], Answers]:
    """
    The batch of two samples: of those that an echo reaches the longest and the shortest.

    The batch as it is where it cannot be made smaller: what another collator than TRL's does is not known.
    """
    batch, answers, segments = draft.batch, draft.answers, draft.segments
    reached = reachable_documents(segments, draft.positions)
    if answers.n_samples <= ROWS or not len(reached) or type(collator) is not DataCollatorForLanguageModeling:
        return batch, answers
    length_D = (segments.end_D - segments.start_D).numpy()
    tokens = np.bincount(answers.sample_D, weights=length_D, minlength=answers.n_samples)
    numbers = sorted(set(answers.sample_D[reached].tolist()), key=lambda number: -tokens[number])
    if len(numbers) == 1:  # another one beside it, so that there is a row without an echo
        numbers.append(next(i for i in range(answers.n_samples) if i != numbers[0]))
    few = [_example(batch, answers, number) for number in (numbers[0], numbers[-1])]
    batch = dict(collator(few))
    return batch, find_answers(batch, few)


def _example(batch: dict[str, Any], answers: Answers, number: int) -> dict[str, Any]:
    """One of the examples that TRL's collator made a batch of."""
    documents = np.flatnonzero(answers.sample_D == number)
    start, end = (bounds[documents].tolist() for bounds in (answers.segments.start_D, answers.segments.end_D))
    example = {name: batch[name].reshape(-1)[start[0] : end[-1]].tolist() for name in ("input_ids", "labels")}
    if is_flat(batch):
        example["seq_lengths"] = [b - a for a, b in zip(start, end, strict=True)]
    return example


def _documents(segments: Segments, positions: str) -> list[int]:
    """The documents to route, the longest first: all that an echo reaches, or the longest ones and the shortest."""
    length_D = segments.end_D - segments.start_D
    reached = reachable_documents(segments, positions).tolist()
    by_length = sorted(reached, key=lambda number: -int(length_D[number]))
    return by_length if len(by_length) <= DOCUMENTS else [*by_length[: DOCUMENTS - 1], by_length[-1]]


def _first_and_later(segments: Segments, documents: list[int]) -> tuple[Tensor, Tensor | None]:
    """Positions of a document that is the first of its row, and of one that follows another; the longest there are."""
    width = segments.shape[1]
    row_D = (segments.start_D // width).tolist()
    firsts = {row: min(d for d in range(len(row_D)) if row_D[d] == row) for row in row_D}
    order = [*documents, *(d for d in range(len(row_D)) if d not in documents)]

    def positions(is_first: bool) -> Tensor | None:
        for document in order:
            if (firsts[row_D[document]] == document) is is_first:
                return torch.arange(int(segments.start_D[document]), int(segments.end_D[document]))
        return None

    first = positions(True)
    return torch.zeros(1, dtype=torch.int64) if first is None else first, positions(False)


def _tiny_ids(batch: dict[str, Any]) -> Tensor:
    """Two rows of answer tokens that differ in their last one, (2, n)."""
    labels = batch["labels"][batch["labels"].ne(IGNORE_INDEX)]
    tokens = (labels if len(labels) else batch["input_ids"].flatten()).unique().cpu()
    row = tokens[torch.arange(TINY) % len(tokens)]
    other = row.clone()
    # Where there is one token only, its neighbour is another one.
    other[-1] = next((token for token in tokens if token != row[-1]), row[-1] - 1 if row[-1] > 0 else row[-1] + 1)
    return torch.stack([row, other])
