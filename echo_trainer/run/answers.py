"""Batches that know where their answers are, on the host, wherever their tensors have gone meanwhile.

What the host must know of a batch to plan its step (which positions predict an answer, which document they belong to)
it finds where the batch is collated, in a worker process if there are any. So planning reads nothing back from a
device. For everybody else the batch is the dict of tensors that the collator returned.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor

from ..method.plan import EchoPlan
from ..method.segments import Segments, find_segments, is_flat
from ..passes.frozen import Documents
from .ownership import Owned, Ownership

PLAN_KEY = "echo_plan"
TEXT_INPUTS = {"input_ids", "attention_mask", "position_ids", "labels"}
# Keys with the same information as `position_ids`, for varlen kernels; the suffix pass lays documents out anew.
PADDING_FREE_INPUTS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


@dataclass(frozen=True)
class Answers:
    """
    What the host knows of a collated batch.

    Attributes:
        segments: its answers.
        sample_D, number_D: int64 (D,), the sample that each document belongs to, and its number inside the sample
            (packed samples hold several).
        position_ids: (1, T) or (B, T) position ids; None where they are column numbers, or have another form.
        n_samples: examples that the batch was made of.
        owned: what each row owns of the inputs that are not text; None where that is not known.
    """

    segments: Segments
    sample_D: np.ndarray
    number_D: np.ndarray
    position_ids: Tensor | None
    n_samples: int
    owned: Owned | None


class EchoBatch(dict):
    """
    What a collator returned, and where its answers are.

    A dict like any other; `answers`, and `documents` where their frozen prefixes are kept, stay on the host when the
    tensors are moved or pinned.
    """

    answers: Answers | None = None
    documents: Documents | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "EchoBatch":
        """The batch with its tensors on `device`. Nobody waits for those that lie in pinned memory."""
        moved = EchoBatch(
            {
                name: send_to_device(value, device, non_blocking or (torch.is_tensor(value) and value.is_pinned()))
                for name, value in self.items()
            }
        )
        moved.answers, moved.documents = self.answers, self.documents
        return moved


def with_plan(batch: dict[str, Any], plan: EchoPlan) -> EchoBatch:
    """A batch with a plan among its inputs."""
    planned = EchoBatch({**batch, PLAN_KEY: plan})
    planned.answers, planned.documents = getattr(batch, "answers", None), getattr(batch, "documents", None)
    return planned


def answers_of(batch: dict[str, Any]) -> Answers:
    """
    Where the answers of a batch are.

    One that comes from a loader of somebody else, or was cut out of a larger one by accelerate (`dispatch_batches`),
    is looked at now, which waits for a device that holds it.
    """
    known = getattr(batch, "answers", None)
    if known is not None:
        return known
    return find_answers(cast("dict[str, Any]", send_to_device(dict(batch), "cpu")))


def find_answers(
    batch: dict[str, Any], examples: Sequence[dict[str, Any]] | None = None, ownership: Ownership | None = None
) -> Answers:
    """
    Look for the answers of a collated batch, on the host.

    Args:
        batch: what the collator returned.
        examples: what it was made of; None where that is not known.
        ownership: of the inputs of the run; None where nobody needs to know what is whose.

    Raises:
        ValueError: the batch has no `labels`.
    """
    segments = find_segments(batch, examples)
    places, names = batch.get("position_ids"), mixed_inputs(batch)
    owned = Owned({}, ()) if not names else None
    if names and ownership is not None and examples is not None:
        owned = ownership.of(batch, examples, names)
    sample_D, number_D = samples_of_documents(segments, examples, is_flat(batch))
    return Answers(
        segments=segments,
        sample_D=sample_D,
        number_D=number_D,
        position_ids=places if places is not None and places.dim() == 2 else None,
        n_samples=segments.shape[0] if examples is None else len(examples),
        owned=owned,
    )


def other_inputs(batch: dict[str, Any]) -> list[str]:
    """Inputs that are not text, such as images."""
    return sorted(set(batch) - TEXT_INPUTS - PADDING_FREE_INPUTS)


def mixed_inputs(batch: dict[str, Any]) -> list[str]:
    """Inputs of which it has to be found out which part belongs to which row."""
    places = batch.get("position_ids")
    return other_inputs(batch) + (["position_ids"] if places is not None and places.dim() != 2 else [])


def backbone_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """What of a batch are arguments of the backbone."""
    return {k: v for k, v in batch.items() if k not in ("labels", "shift_labels", PLAN_KEY)}


def samples_of_documents(
    segments: Segments, examples: Sequence[dict[str, Any]] | None, flat: bool
) -> tuple[np.ndarray, np.ndarray]:
    """
    For every document the sample it belongs to and its number inside the sample, (D,) each.

    Args:
        segments: of the batch.
        examples: what it was made of; None takes each row for a sample.
        flat: whether documents are told apart by position ids (`segments.is_flat`).
    """
    rows, length = segments.shape
    row_D = segments.start_D.numpy() // length
    if flat and examples is None:
        return row_D, _numbered(row_D)
    counts = [len(example.get("seq_lengths") or [0]) for example in examples or ()]
    if not flat or (rows == len(counts) == sum(counts)):
        return row_D, np.zeros_like(row_D)
    # Positions that pad a padding-free batch count as documents of their own; they hold no answer.
    counts.append(len(row_D) - sum(counts))
    sample_D = np.arange(len(counts)).repeat(counts)
    return sample_D, _numbered(sample_D)


def _numbered(group_D: np.ndarray) -> np.ndarray:
    """The number of each member of a group inside it; groups are numbers in increasing order."""
    return np.arange(len(group_D)) - np.searchsorted(group_D, group_D)
