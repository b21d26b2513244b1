"""Answer segments: from labels to answer spans, their documents and their boundaries. Host side, no model.

Shapes: B rows, T tokens a row, F = B*T positions of the flattened batch, S segments, D documents.
A *document* is what attention can see: a row of a padded batch, or one of the sequences of a padding-free row.
A *segment* is a run of answer tokens (label != -100) inside a document. Its *boundary* is the token before it, the
last token of the prompt. A segment at the very start of a document has no prompt, so no boundary and no echo.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Segments:
    """
    Where the answers of a batch are. All indices count positions of the flattened batch, row * T + t.

    Few numbers for long rows: what a worker process finds is sent to the one that trains.

    Attributes:
        shape: (B, T).
        predict_N: int64 (N,), positions that predict an answer token, increasing.
        labels_N: int64 (N,), the tokens they predict.
        document_N: int64 (N,), document of each of them, -1 where it is padding.
        start_S, end_S: int64 (S,), first position and one past the last of each segment with a boundary, increasing.
        document_S: int64 (S,), document of each segment.
        start_D, end_D: int64 (D,), first position and one past the last position of each document.
    """

    shape: tuple[int, int]
    predict_N: Int[Tensor, "N"]
    labels_N: Int[Tensor, "N"]
    document_N: Int[Tensor, "N"]
    start_S: Int[Tensor, "S"]
    end_S: Int[Tensor, "S"]
    document_S: Int[Tensor, "S"]
    start_D: Int[Tensor, "D"]
    end_D: Int[Tensor, "D"]

    @property
    def n_positions(self) -> int:
        """Number of positions F of the flattened batch."""
        return self.shape[0] * self.shape[1]

    @property
    def n_documents(self) -> int:
        """Number of documents D."""
        return len(self.start_D)

    @property
    def boundary_S(self) -> Int[Tensor, "S"]:
        """int64 (S,): boundary position of each segment."""
        return self.start_S - 1

    @property
    def answered_D(self) -> Bool[Tensor, "D"]:
        """bool (D,): documents with at least one predicted answer token."""
        answered = torch.zeros(self.n_documents + 1, dtype=torch.bool)  # the last for padding
        answered[self.document_N] = True
        return answered[:-1]

    @property
    def routable_D(self) -> Bool[Tensor, "D"]:
        """bool (D,): documents with at least one segment that has a boundary."""
        routable = torch.zeros(self.n_documents, dtype=torch.bool)
        routable[self.document_S] = True
        return routable & self.answered_D

    @cached_property
    def document_F(self) -> Int[Tensor, "F"]:
        """int64 (F,): document of each position, -1 for padding."""
        return numbered_spans(self.n_positions, self.start_D, self.end_D)

    @cached_property
    def segment_F(self) -> Int[Tensor, "F"]:
        """int64 (F,): segment of each answer token, -1 outside answers and in segments without a boundary."""
        return numbered_spans(self.n_positions, self.start_S, self.end_S)


def numbered_spans(n: int, start: Int[Tensor, "spans"], end: Int[Tensor, "spans"]) -> Int[Tensor, "{n}"]:
    """int64 (n,): the number of the span [start, end) that each position lies in, -1 in none; spans are disjoint."""
    length = end - start
    found = torch.full((n,), -1)
    found[spans(start, length)] = torch.arange(len(start)).repeat_interleave(length)
    return found


def spans(start: Int[Tensor, "spans"], length: Int[Tensor, "spans"]) -> Int[Tensor, "n"]:
    """int64 (n,): the positions of spans that begin at `start`, span after span."""
    end = length.cumsum(0)
    return (start - end + length).repeat_interleave(length) + torch.arange(int(end[-1]) if len(end) else 0)


def find_segments(batch: dict[str, Any], examples: Sequence[dict[str, Any]] | None = None) -> Segments:
    """
    Find the answer segments of a collated batch, on the host.

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
    n_rows, length = batch["labels"].shape
    labels_F = batch["labels"].numpy().reshape(-1)
    document_F = _documents(batch, n_rows, length)
    changes = np.flatnonzero(document_F[1:] != document_F[:-1]) + 1
    starts, ends = np.append(0, changes), np.append(changes, len(document_F))
    real = document_F[starts] >= 0
    start_D, end_D = starts[real], ends[real]

    labelled = labels_F != IGNORE_INDEX
    predicted = np.flatnonzero(labelled)
    predicted = predicted[predicted % length != 0]

    answer_F = labelled & (document_F >= 0)
    if is_flat(batch) and examples:
        answer_F[start_D[_begins_with_answer(start_D, examples)]] = True
    answer = np.flatnonzero(answer_F)
    document = document_F[answer]
    new = np.ones(len(answer) + 1, bool)
    new[1:-1] = (answer[1:] != answer[:-1] + 1) | (document[1:] != document[:-1])
    start, end = answer[new[:-1]], answer[new[1:]] + 1
    document = document[new[:-1]]
    has_boundary = start != start_D[document]
    arrays = (
        predicted - 1, labels_F[predicted], document_F[predicted - 1],
        start[has_boundary], end[has_boundary], document[has_boundary], start_D, end_D,
    )  # fmt: skip
    return Segments((n_rows, length), *(torch.from_numpy(array.astype(np.int64, copy=False)) for array in arrays))


def is_flat(batch: dict[str, Any]) -> bool:
    """Whether documents are told apart by position ids that restart (packed and padding-free batches)."""
    places = batch.get("position_ids")
    return batch.get("attention_mask") is None and places is not None and places.shape == batch["labels"].shape


def has_boundary(example: dict[str, Any]) -> bool:
    """Whether a prepared example (`input_ids`, `labels`, and `seq_lengths` if packed) has an answer after a prompt."""
    labels = torch.as_tensor(example["labels"])
    lengths = example.get("seq_lengths") or [len(labels)]
    for document in labels.split(list(lengths)):
        answer = document.ne(IGNORE_INDEX)
        if bool((answer[1:] & ~answer[:-1]).any()):
            return True
    return False


def _documents(batch: dict[str, Any], n_rows: int, length: int) -> Int[np.ndarray, "{n_rows*length}"]:
    """Number of the document of every position, 0, 1, 2 ... in order; -1 for padding; (F,)."""
    if is_flat(batch):
        return (batch["position_ids"].numpy().reshape(-1) == 0).cumsum() - 1
    mask = batch.get("attention_mask")
    real = np.ones((n_rows, length), bool) if mask is None or mask.dim() != 2 else mask.numpy() != 0
    starts = real.copy()
    starts[:, 1:] &= ~real[:, :-1]
    return np.where(real, starts.reshape(-1).cumsum().reshape(n_rows, length) - 1, -1).reshape(-1)


def _begins_with_answer(start_D: Int[np.ndarray, "D"], examples: Sequence[dict[str, Any]]) -> Bool[np.ndarray, "D"]:
    """bool (D,): documents of a flat batch whose first token is one of an answer."""
    if not all("labels" in example for example in examples):
        return np.ones(len(start_D), bool)  # TRL's collator then trains on every token
    ends = np.cumsum([len(example["labels"]) for example in examples])
    number_D = np.searchsorted(ends, start_D, side="right")
    begins = np.zeros(len(start_D), bool)
    for document, (number, start) in enumerate(zip(number_D.tolist(), start_D.tolist(), strict=True)):
        if number < len(examples):  # what pads a flat batch belongs to no example
            labels = examples[number]["labels"]
            begins[document] = int(labels[start - ends[number]]) != IGNORE_INDEX
    return begins
