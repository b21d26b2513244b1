"""What the passes are compared on: at most two rows of a batch, in the batch's own layout. Host side."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .collator import PLAN_KEY, DraftPlan
from .layouts import EchoForm
from .plan import make_plan
from .proof import ProofTask
from .segments import IGNORE_INDEX, Segments, find_segments

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
        draft: a batch of the kind that is to be proved; one without answers gives a task of no weight.
        form: of the echo pass.
        collator: that made the batch.
        device: of the model.
    """
    batch, segments = _few_rows(draft, collator)
    documents = _documents(segments)
    plans = []
    # All of them, and the shortest alone: what else is in a pass must make no difference.
    for routed in {tuple(documents), tuple(documents[-1:])}:
        chosen = [number in routed for number in range(segments.n_documents)]
        options = {"positions": draft.positions, "form": form, "position_ids": batch.get("position_ids")}
        plans.append(make_plan(segments, chosen, **options, lockstep=True))
    plans.sort(key=lambda plan: -plan.n_routed)
    while len(plans) < 2:  # as many passes on every process
        plans.append(plans[0])
    task = ProofTask(
        form=form,
        plans=tuple(plan.to(device) for plan in plans),
        tiny_ids=_tiny_ids(batch).to(device),
        alone_n=_later_document(segments, documents, device),
    )
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "shift_labels", PLAN_KEY)}
    return send_to_device(inputs, device), task


@contextmanager
def no_trace(model: nn.Module) -> Iterator[None]:
    """
    Evaluation mode without gradients inside; afterwards every module is in the mode it was in, and every stream of
    random numbers where it was.
    """
    import random

    import numpy as np

    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    streams = {"devices": []} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
    states = random.getstate(), np.random.get_state()
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(**streams):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        random.setstate(states[0])
        np.random.set_state(states[1])


def _few_rows(draft: DraftPlan, collator: Callable) -> tuple[dict[str, Any], Segments]:
    """The batch of the longest and the shortest example; the batch as it is where it cannot be made smaller."""
    if len(draft.examples) <= ROWS or type(collator) is not DataCollatorForLanguageModeling:
        return draft.batch, draft.segments
    answered = [e for e in draft.examples if _has_answer(e)] or list(draft.examples)
    by_length = sorted(answered, key=lambda example: -len(example["input_ids"]))
    examples = [by_length[0], by_length[-1]] if len(by_length) > 1 else by_length
    batch = dict(collator(examples))
    return batch, find_segments(batch, examples)


def _has_answer(example: dict[str, Any]) -> bool:
    labels = example.get("labels", example["input_ids"])
    return any(label != IGNORE_INDEX for label in labels[1:])


def _documents(segments: Segments) -> list[int]:
    """The routable documents to route, the longest first: all of them, or the longest ones and the shortest."""
    length_D = segments.end_D - segments.start_D
    routable = segments.routable_D.nonzero().flatten().tolist()
    by_length = sorted(routable, key=lambda number: -int(length_D[number]))
    return by_length if len(by_length) <= DOCUMENTS else [*by_length[: DOCUMENTS - 1], by_length[-1]]


def _later_document(segments: Segments, documents: list[int], device: torch.device | str) -> Tensor | None:
    """Positions of a document that follows another one in its row."""
    length = segments.shape[1]
    for number in documents:
        if int(segments.start_D[number]) % length:
            before = number > 0 and int(segments.start_D[number - 1]) // length
            if number > 0 and before == int(segments.start_D[number]) // length:
                return torch.arange(int(segments.start_D[number]), int(segments.end_D[number])).to(device)
    return None


def _tiny_ids(batch: dict[str, Any]) -> Tensor:
    """Two rows of answer tokens that differ in their last one, (2, n)."""
    labels = batch["labels"][batch["labels"].ne(IGNORE_INDEX)] if "labels" in batch else batch["input_ids"].flatten()
    tokens = (labels if len(labels) else batch["input_ids"].flatten()).unique()
    row = tokens[torch.arange(TINY) % len(tokens)]
    other = row.clone()
    # Where there is one token only, its neighbour is another one.
    other[-1] = next((token for token in tokens if token != row[-1]), row[-1] - 1 if row[-1] > 0 else row[-1] + 1)
    return torch.stack([row, other])
