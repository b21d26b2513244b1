"""What the passes are compared on: at most two rows of a batch, in the batch's own layout. Host side."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..method.layouts import EchoForm
from ..method.plan import make_plan
from ..method.segments import IGNORE_INDEX, Segments, find_segments
from ..passes.proof import ProofTask
from .collate import PLAN_KEY, DraftPlan, places_of, reachable_documents, sample_of_document

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
    batch, segments = _few_rows(draft, collator)
    documents = _documents(segments, draft.positions)
    options = {"positions": draft.positions, "form": form, "position_ids": places_of(batch), "lockstep": True}
    options["n_parts"] = 1 if draft.lockstep else None  # as many on every process
    # All of them, and the shortest alone: what else is in a pass must make no difference. As many on every process.
    chosen = (documents, documents[-1:])
    plans = [make_plan(segments, [d in routed for d in range(segments.n_documents)], **options) for routed in chosen]
    first, later = _first_and_later(segments, documents)
    task = ProofTask(
        form=form,
        plans=tuple(plan.to(device) for plan in plans),
        tiny_ids=_tiny_ids(batch).to(device),
        first_n=first.to(device),
        later_n=None if later is None else later.to(device),
    )
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "shift_labels", PLAN_KEY)}
    return send_to_device(inputs, device), task


@contextmanager
def no_trace(model: nn.Module) -> Iterator[None]:
    """
    Evaluation mode without gradients inside. Afterwards the mode, the buffers and the plain attributes of every module
    are as they were (rotary embeddings remember the longest sequence they have seen), and so are all random numbers.
    """
    before = [(module, module.training, _memory_of(module)) for module in model.modules()]
    states = random.getstate(), np.random.get_state()
    device = next(model.parameters()).device
    streams = {"devices": []} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
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


def _few_rows(draft: DraftPlan, collator: Callable) -> tuple[dict[str, Any], Segments]:
    """
    The batch of two examples: of those that an echo reaches the longest and the shortest.

    The batch as it is where it cannot be made smaller: what another collator than TRL's does is not known.
    """
    examples = draft.examples
    reached = reachable_documents(draft.segments, draft.positions).tolist()
    if len(examples) <= ROWS or not reached or type(collator) is not DataCollatorForLanguageModeling:
        return draft.batch, draft.segments
    places = sample_of_document(draft.segments, examples)
    numbers = sorted({places[document][0] for document in reached}, key=lambda i: -len(examples[i]["input_ids"]))
    if len(numbers) == 1:  # another one beside it, so that there is a row without an echo
        numbers.append(next(i for i in range(len(examples)) if i != numbers[0]))
    few = [examples[numbers[0]], examples[numbers[-1]]]
    batch = dict(collator(few))
    return batch, find_segments(batch, few)


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
    labels = batch["labels"][batch["labels"].ne(IGNORE_INDEX)] if "labels" in batch else batch["input_ids"].flatten()
    tokens = (labels if len(labels) else batch["input_ids"].flatten()).unique()
    row = tokens[torch.arange(TINY) % len(tokens)]
    other = row.clone()
    # Where there is one token only, its neighbour is another one.
    other[-1] = next((token for token in tokens if token != row[-1]), row[-1] - 1 if row[-1] > 0 else row[-1] + 1)
    return torch.stack([row, other])
