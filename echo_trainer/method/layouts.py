"""Which tokens an echo pass runs: suffixes, whole rows, or one token to keep processes in step. Host side.

Shapes: F = B*T positions of the batch, E positions that predict an answer token and that the echo reaches; in the echo
pass R rows of A tokens after P prefix tokens, J positions that receive an echo; D documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

from .indices import Indices
from .segments import Segments


class EchoForm(StrEnum):
    """
    How an echo pass is computed, the cheapest first.

    SUFFIX runs what follows the first echo of each routed document, ROWS the rows that hold a routed document, BATCH
    every row (where an input belongs to no row, or to several).
    """

    SUFFIX = "suffix"
    ROWS = "full"
    BATCH = "full (whole batches)"


@dataclass(frozen=True)
class Pick(Indices):
    """
    What some rows own of an input.

    Attributes:
        index: int64 (n,), entries along `axis`.
        axis: of the input.
    """

    index: Tensor
    axis: int


@dataclass(frozen=True)
class PassLayout(Indices):
    """
    Which tokens the echo pass runs, where it adds the echo, and which of its outputs are used.

    Attributes:
        inject_position_J: int64 (J,), positions in the flattened (R, A) input of the pass that receive an echo.
        inject_segment_J: int64 (J,), routed segment (0 .. G-1) whose echo each of them receives.
        output_position_E: int64 (E,), positions in the flattened (R, A) output that predict an answer token.
    """

    inject_position_J: Tensor
    inject_segment_J: Tensor
    output_position_E: Tensor


@dataclass(frozen=True)
class FullLayout(PassLayout):
    """
    The echo pass runs whole rows of the batch again.

    Attributes:
        row_R: int64 (R,), the rows of the batch that are run; None for all of them as they are.
        picks: what these rows own of the inputs that are not text, by name.
    """

    row_R: Tensor | None
    picks: dict[str, Pick] = field(default_factory=dict)


@dataclass(frozen=True)
class SuffixLayout(PassLayout):
    """
    The echo pass runs only what follows the first echo of each routed document, on keys and values of the plain pass.

    Documents become rows: P prefix positions, right-aligned so that a prefix ends where its suffix begins, then A
    suffix positions, left-aligned. That is the layout of a left-padded prompt with a cache, which every attention
    kernel and mask of transformers understands, sliding windows included.

    Attributes:
        token_RA: int64 (R, A), position in F of each suffix token (padding repeats a valid one).
        position_RA: int64 (R, A), position id of each suffix token. At least one place of padding carries the largest
            position id of the batch: some rotary embeddings depend on it, and the plain pass has seen it.
        prefix_RP: int64 (R, P), position in F of each prefix token (padding repeats a valid one).
        mask_RK: int64 (R, P + A), 1 for real prefix and suffix tokens.
        real_token, real_prefix: int64, where the flattened `token_RA` and `prefix_RP` are not padding.
    """

    token_RA: Tensor
    position_RA: Tensor
    prefix_RP: Tensor
    mask_RK: Tensor
    real_token: Tensor
    real_prefix: Tensor


Layout = FullLayout | SuffixLayout


def full_layout(
    segments: Segments,
    inject_F: Tensor,
    reached: Tensor,
    position_ids: Tensor | None = None,
    all_rows: bool = False,
    images: Sequence[int] = (),
) -> FullLayout:
    """
    The rows that hold a reached position, whole, the one with the largest position id (see `SuffixLayout`), and one
    with an image where others have some: a model may go another way without any.

    Args:
        segments: the answers of the batch.
        inject_F: routed segment whose echo is added at each position, -1 where none, (F,).
        reached: positions in F that the echo reaches and that predict an answer token, (E,).
        position_ids: as for `plan.make_plan`.
        all_rows: run every row.
        images: of each row; empty where there are none.
    """
    n_rows, length = segments.shape
    rows = reached // length
    if any(images) and not any(images[row] for row in rows.tolist()):
        rows = torch.cat([rows, torch.tensor([next(row for row, count in enumerate(images) if count)])])
    if position_ids is not None and position_ids.shape[0] == n_rows:
        rows = torch.cat([rows, position_ids.reshape(-1).argmax()[None] // length])
    row_R = torch.arange(n_rows) if all_rows else torch.unique(rows)
    new_row = torch.full((n_rows,), -1)
    new_row[row_R] = torch.arange(len(row_R))
    inject = inject_F.ge(0).nonzero().flatten()
    inject = inject[new_row[inject // length].ge(0)]
    return FullLayout(
        row_R=None if len(row_R) == n_rows else row_R,
        inject_position_J=new_row[inject // length] * length + inject % length,
        inject_segment_J=inject_F[inject],
        output_position_E=new_row[reached // length] * length + reached % length,
    )


def suffix_layout(
    segments: Segments, inject_F: Tensor, first_D: Tensor, reached: Tensor, position_ids: Tensor | None
) -> SuffixLayout:
    """
    What follows the first echo of each document that holds a reached position.

    Args:
        segments: the answers of the batch.
        inject_F, reached: as for `full_layout`.
        first_D: first position that receives an echo in each document, (D,).
        position_ids: as for `plan.make_plan`.
    """
    document_E = segments.document_F[reached]
    documents, row_E = torch.unique(document_E, return_inverse=True)
    begin_R = first_D[documents]
    # The last answer token predicts nothing, so a suffix ends at the last position that predicts.
    last_R = torch.zeros_like(begin_R).scatter_reduce_(0, row_E, reached, "amax")
    start_R = segments.start_D[documents]
    length_R = last_R - begin_R + 1
    prefix_R = begin_R - start_R

    place_F = _position_ids(segments, position_ids)
    longest = int(length_R.max())
    # A place of padding for the largest position id, where no row is shorter than the longest.
    offset_A = torch.arange(longest + int(bool(length_R.eq(longest).all())))
    token_RA = torch.minimum(begin_R[:, None] + offset_A, last_R[:, None])
    n_prefix = max(int(prefix_R.max()), 1)  # a zero-width cache is a special case for no kernel
    prefix_RP = torch.maximum(begin_R[:, None] - n_prefix + torch.arange(n_prefix), start_R[:, None])
    real_prefix_RP = torch.arange(n_prefix).ge(n_prefix - prefix_R[:, None])
    real_token_RA = offset_A.lt(length_R[:, None])
    position_RA = torch.where(real_token_RA, place_F[token_RA], place_F.max())
    inject_RA = inject_F[token_RA].masked_fill(~real_token_RA, -1).reshape(-1)
    inject = inject_RA.ge(0).nonzero().flatten()
    return SuffixLayout(
        token_RA=token_RA,
        position_RA=position_RA,
        prefix_RP=prefix_RP,
        mask_RK=torch.cat([real_prefix_RP, real_token_RA], dim=1).long(),
        real_token=real_token_RA.reshape(-1).nonzero().flatten(),
        real_prefix=real_prefix_RP.reshape(-1).nonzero().flatten(),
        inject_position_J=inject,
        inject_segment_J=inject_RA[inject],
        output_position_E=row_E * len(offset_A) + reached - begin_R[row_E],
    )


def weightless_layout(segments: Segments, form: EchoForm, position_ids: Tensor | None) -> tuple[Layout, Tensor]:
    """
    The smallest echo pass there is, for a process that routes nothing while others do.

    Args:
        segments: the answers of the batch, which need not hold any.
        form: of the pass; a suffix of one token, one row, or the batch.
        position_ids: as for `plan.make_plan`.

    Returns:
        The layout, with E = J = 1, and a position to take an echo from, (1,).
    """
    first = int(segments.start_D[0]) if segments.n_documents else 0
    last = min(first + 1, int(segments.end_D[0]) - 1 if segments.n_documents else 0)
    one = torch.zeros(1, dtype=torch.int64)
    if form is not EchoForm.SUFFIX:
        inject_F = torch.full_like(segments.segment_F, -1)
        inject_F[last] = 0
        layout = full_layout(segments, inject_F, one + last, position_ids, all_rows=form is EchoForm.BATCH)
        return layout, one + first
    prefix = torch.arange(int(last > first))
    layout = SuffixLayout(
        token_RA=one[None] + last,
        position_RA=_position_ids(segments, position_ids)[one[None] + last],
        prefix_RP=one[None] + first,
        mask_RK=torch.tensor([[len(prefix), 1]]),
        real_token=one,
        real_prefix=prefix,
        inject_position_J=one,
        inject_segment_J=one,
        output_position_E=one,
    )
    return layout, one + first


def _position_ids(segments: Segments, position_ids: Tensor | None) -> Tensor:
    """Position id of every position of the flattened batch, (F,)."""
    if position_ids is not None:
        return position_ids.expand(segments.shape).reshape(-1)
    return torch.arange(segments.shape[1]).repeat(segments.shape[0])
