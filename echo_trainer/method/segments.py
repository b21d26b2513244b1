"""Answer segments: from labels to answer spans, their documents and their boundaries. Host side, no model.

Shapes: B rows, T tokens a row, F = B*T positions of the flattened batch, S segments, D documents.
A *document* is what attention can see: a row of a padded batch, or one of the sequences of a padding-free row.
A *segment* is a run of answer tokens (label != -100) inside a document. Its *boundary* is the token before it, the
last token of the prompt. A segment at the very start of a document has no prompt, so no boundary and no echo.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Segments:
    """
    Where the answers of a batch are. All indices count positions of the flattened batch, row * T + t.

    Attributes:
        shape: (B, T).
        predict_F: bool (F,), positions that predict an answer token.
        labels_F: int64 (F,), the token to predict at each position (-100 where none).
        segment_F: int64 (F,), segment of each answer token, -1 outside answers and in segments without a boundary.
        boundary_S: int64 (S,), boundary position of each segment.
        document_S: int64 (S,), document of each segment.
        document_F: int64 (F,), document of each position, -1 for padding.
        start_D, end_D: int64 (D,), first position and one past the last position of each document.
    """

    shape: tuple[int, int]
    predict_F: Tensor
    labels_F: Tensor
    segment_F: Tensor
    boundary_S: Tensor
    document_S: Tensor
    document_F: Tensor
    start_D: Tensor
    end_D: Tensor

    @property
    def n_documents(self) -> int:
        """Number of documents D."""
        return len(self.start_D)

    @property
    def answered_D(self) -> Tensor:
        """bool (D,): documents with at least one predicted answer token."""
        answered = torch.zeros(self.n_documents, dtype=torch.bool)
        answered[self.document_F[self.predict_F]] = True
        return answered

    @property
    def routable_D(self) -> Tensor:
        """bool (D,): documents with at least one segment that has a boundary."""
        routable = torch.zeros(self.n_documents, dtype=torch.bool)
        routable[self.document_S] = True
        return routable & self.answered_D


def find_segments(batch: dict[str, Any], examples: Sequence[dict[str, Any]] | None = None) -> Segments:
    """
    Find the answer segments of a collated batch.

    Args:
        batch: what a collator of TRL returned: `labels` (B, T), and `attention_mask` (B, T) of a padded batch or
            `position_ids` (1, T), restarting at 0 with each document, of a padding-free one.
        examples: the examples the batch was made of. TRL's padding-free collator masks the first label of every
            document; with the examples at hand a document that starts with an answer is told from one that starts
            with a one-token prompt.

    Raises:
        ValueError: the batch has no `labels`.
    """
    if "labels" not in batch:
        raise ValueError(
            f"The collated batch has the keys {sorted(batch)} and no 'labels', so nothing says where the answers are. "
            f"Use a collator that returns 'labels' with -100 on prompt tokens, or leave `data_collator` out."
        )
    labels_BT = batch["labels"]
    n_rows, length = labels_BT.shape
    document_F = _number_runs(_documents(batch, n_rows, length).reshape(-1))
    answer_F = _true_labels(batch, examples).reshape(-1).ne(IGNORE_INDEX) & document_F.ge(0)

    next_label_BT = torch.full_like(labels_BT, IGNORE_INDEX)
    next_label_BT[:, :-1] = labels_BT[:, 1:]
    next_label_F = next_label_BT.reshape(-1)

    previous_answer_F = torch.zeros_like(answer_F)
    previous_answer_F[1:] = answer_F[:-1] & document_F[:-1].eq(document_F[1:])
    starts_document_F = torch.ones_like(answer_F)
    starts_document_F[1:] = document_F[:-1].ne(document_F[1:])
    start_F = answer_F & ~previous_answer_F
    run_F = start_F.cumsum(0) - 1

    start_position = start_F.nonzero().flatten()
    has_boundary = ~starts_document_F[start_position]
    number = has_boundary.cumsum(0) - 1
    number[~has_boundary] = -1
    segment_F = torch.full_like(run_F, -1)
    segment_F[answer_F] = number[run_F[answer_F]]
    first_position = start_position[has_boundary]

    real = document_F.ge(0)
    document_start = (starts_document_F & real).nonzero().flatten()
    ends = torch.ones_like(real)
    ends[:-1] = document_F[:-1].ne(document_F[1:])
    return Segments(
        shape=(n_rows, length),
        predict_F=next_label_F.ne(IGNORE_INDEX),
        labels_F=next_label_F,
        segment_F=segment_F,
        boundary_S=first_position - 1,
        document_S=document_F[first_position],
        document_F=document_F,
        start_D=document_start,
        end_D=(ends & real).nonzero().flatten() + 1,
    )


def has_boundary(example: dict[str, Any]) -> bool:
    """Whether a prepared example (`input_ids`, `labels`, and `seq_lengths` if packed) has an answer after a prompt."""
    labels = torch.as_tensor(example["labels"])
    lengths = example.get("seq_lengths") or [len(labels)]
    for document in labels.split(list(lengths)):
        answer = document.ne(IGNORE_INDEX)
        if bool((answer[1:] & ~answer[:-1]).any()):
            return True
    return False


def _number_runs(ids_F: Tensor) -> Tensor:
    """Number the runs of equal ids 0, 1, 2 ... in order; -1 stays -1."""
    starts = torch.ones_like(ids_F, dtype=torch.bool)
    starts[1:] = ids_F[1:].ne(ids_F[:-1])
    real = ids_F.ge(0)
    return (starts & real).cumsum(0).sub(1).masked_fill(~real, -1)


def _documents(batch: dict[str, Any], n_rows: int, length: int) -> Tensor:
    """An id per position that changes where a document ends, (B, T); padding gets -1."""
    attention_mask = batch.get("attention_mask")
    position_ids = batch.get("position_ids")
    if attention_mask is None and position_ids is not None:
        return position_ids.eq(0).reshape(-1).cumsum(0).sub(1).reshape(n_rows, length)
    rows = torch.arange(n_rows)[:, None].expand(n_rows, length)
    if attention_mask is None or attention_mask.dim() != 2:
        return rows
    return rows.masked_fill(attention_mask.eq(0), -1)


def _true_labels(batch: dict[str, Any], examples: Sequence[dict[str, Any]] | None) -> Tensor:
    """Labels with what the padding-free collator masked at document starts put back, (B, T)."""
    labels = batch["labels"]
    if not examples or "attention_mask" in batch or "position_ids" not in batch:
        return labels
    if not all("labels" in example for example in examples):
        return batch["input_ids"]  # TRL's collator then trains on every token
    flat = torch.cat([torch.as_tensor(example["labels"]) for example in examples])
    restored = labels.clone()
    restored[0, : len(flat)] = flat
    return restored
