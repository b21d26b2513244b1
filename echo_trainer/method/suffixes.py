"""Lay out the suffix pass: what follows the first echo of each routed document, documents of like length together.

Shapes: F = B*T positions of the batch, E reached positions that predict an answer token, D documents; R rows (routed
documents) of A suffix tokens after P prefix tokens, n prefix tokens of all rows, J positions that receive an echo.
"""

from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from .grouping import group_rows
from .layouts import EchoForm, Layout, SuffixLayout, SuffixPart, full_layout, position_ids_F
from .segments import Segments


def suffix_layout(
    segments: Segments,
    inject_F: Int[Tensor, "F"],
    first_D: Int[Tensor, "D"],
    reached: Int[Tensor, "E"],
    position_ids: Int[Tensor, "rows T"] | None,
    n_parts: int | None = None,
    recompute: bool = False,
) -> SuffixLayout:
    """
    What follows the first echo of each document that holds a reached position.

    Args:
        segments: the answers of the batch.
        inject_F, reached: as for `layouts.full_layout`.
        first_D: first position that receives an echo in each document, (D,).
        position_ids: as for `plan.make_plan`.
        n_parts: as many passes; None for the cheapest number.
        recompute: see `SuffixLayout`.
    """
    documents, row_E = torch.unique(segments.document_F[reached], return_inverse=True)
    begin_R = first_D[documents]
    # The last answer token predicts nothing, so a suffix ends at the last position that predicts.
    last_R = torch.zeros_like(begin_R).scatter_reduce_(0, row_E, reached, "amax")
    start_R = segments.start_D[documents]
    groups = group_rows(last_R - begin_R + 1, begin_R - start_R, n_parts)
    place_F = position_ids_F(segments, position_ids)
    if len(groups) == 1:
        part = _part(begin_R, last_R, start_R, row_E, reached, inject_F, place_F)
        return _filled(SuffixLayout((part,), recompute=recompute), n_parts, segments, place_F)

    group_R, new_row_R = torch.empty_like(begin_R), torch.empty_like(begin_R)
    for number, rows in enumerate(groups):
        group_R[rows], new_row_R[rows] = number, torch.arange(len(rows))
    group_E = group_R[row_E]
    at_E = torch.argsort(group_E, stable=True)
    parts = tuple(
        _part(begin_R[rows], last_R[rows], start_R[rows], new_row_R[row_E[at]], reached[at], inject_F, place_F)
        for rows, at in zip(groups, at_E.split(torch.bincount(group_E).tolist()), strict=True)
    )
    order_E = torch.empty_like(at_E)
    order_E[at_E] = torch.arange(len(at_E))
    return _filled(SuffixLayout(parts, order_E, recompute=recompute), n_parts, segments, place_F)


def _part(
    begin_R: Int[Tensor, "R"],
    last_R: Int[Tensor, "R"],
    start_R: Int[Tensor, "R"],
    row_E: Int[Tensor, "E"],
    reached: Int[Tensor, "E"],
    inject_F: Int[Tensor, "F"],
    place_F: Int[Tensor, "F"],
) -> SuffixPart:
    """One pass over the suffixes begin .. last of documents that begin at `start_R`."""
    length_R, prefix_R = last_R - begin_R + 1, begin_R - start_R
    longest, n_prefix = int(length_R.max()), max(int(prefix_R.max()), 1)  # a cache of no width is a special case
    # The largest position id needs a place of padding. Where no row is shorter than the longest: a column, or a row
    # of its own where that is less.
    level = bool(length_R.eq(longest).all())
    width, spare = longest + int(level and len(length_R) <= longest), int(level and len(length_R) > longest)
    if spare:
        begin_R, last_R = (torch.cat([x_R, x_R[:1]]) for x_R in (begin_R, last_R))
        length_R, prefix_R = (torch.cat([x_R, x_R.new_zeros(1)]) for x_R in (length_R, prefix_R))

    offset_A = torch.arange(width)
    token_RA = torch.minimum(begin_R[:, None] + offset_A, last_R[:, None])
    real_RA = offset_A.lt(length_R[:, None])
    seen_RA = offset_A.lt(length_R[:, None].clamp(min=1))  # a token that sees nothing, not itself either, is NaN
    real_RP = torch.arange(n_prefix).ge(n_prefix - prefix_R[:, None])
    inject_RA = inject_F[token_RA].masked_fill(~real_RA, -1).reshape(-1)
    inject = inject_RA.ge(0).nonzero().flatten()
    row_n = torch.arange(len(prefix_R)).repeat_interleave(prefix_R)
    back_n = (prefix_R.cumsum(0))[row_n] - torch.arange(len(row_n))  # tokens from here to where the suffix begins
    return SuffixPart(
        token_RA=token_RA,
        position_RA=torch.where(real_RA, place_F[token_RA], place_F.max()),
        mask_RK=torch.cat([real_RP, seen_RA], dim=1).long(),
        real_token=real_RA.reshape(-1).nonzero().flatten(),
        prefix_n=begin_R[row_n] - back_n,
        place_n=row_n * (n_prefix + width) + n_prefix - back_n,
        n_prefix=n_prefix,
        inject_position_J=inject,
        inject_segment_J=inject_RA[inject],
        output_position_E=row_E * width + reached - begin_R[row_E],
    )


def weightless_layout(
    segments: Segments, form: EchoForm, position_ids: Int[Tensor, "rows T"] | None, n_parts: int | None = None
) -> tuple[Layout, Int[Tensor, "1"]]:
    """
    The smallest echo pass there is, for a process that routes nothing while others do.

    Args:
        segments: the answers of the batch, which need not hold any.
        form: of the pass; suffixes of one token, one row, or the batch.
        position_ids: as for `plan.make_plan`.
        n_parts: number of passes over suffixes, 1 where it is None.

    Returns:
        The layout, with E = J = 1 in each of its parts, and a position to take an echo from, (1,).
    """
    first, last = _first_two(segments)
    one = torch.zeros(1, dtype=torch.int64)
    if form.runs_suffixes:
        layout = SuffixLayout((), recompute=form is EchoForm.RECOMPUTED)
        return _filled(layout, n_parts or 1, segments, position_ids_F(segments, position_ids)), one + first
    inject_F = torch.full((segments.shape[0] * segments.shape[1],), -1)
    inject_F[last] = 0
    return full_layout(segments, inject_F, one + last, position_ids, all_rows=form is EchoForm.BATCH), one + first


def _filled(layout: SuffixLayout, n_parts: int | None, segments: Segments, place_F: Int[Tensor, "F"]) -> SuffixLayout:
    """The layout with parts of one token, without weight, up to `n_parts` in all."""
    n_idle = (n_parts or 0) - len(layout.parts)
    if n_idle <= 0:
        return layout
    _, last = _first_two(segments)
    one = torch.zeros(1, dtype=torch.int64)
    echo = one[: int(not layout.parts)]  # beside real parts an echo would be counted in the metrics
    idle = SuffixPart(
        token_RA=one[None] + last,
        position_RA=place_F[one[None] + last],
        mask_RK=torch.tensor([[0, 1]]),
        real_token=one,
        prefix_n=one[:0],  # a prefix token belongs to one part only
        place_n=one[:0],
        n_prefix=1,
        inject_position_J=echo,
        inject_segment_J=echo,
        output_position_E=one,
    )
    return replace(layout, parts=(*layout.parts, *[idle] * n_idle), n_idle=n_idle)


def _first_two(segments: Segments) -> tuple[int, int]:
    """First and second position of the first document; the same where it has only one."""
    first = int(segments.start_D[0]) if segments.n_documents else 0
    return first, min(first + 1, int(segments.end_D[0]) - 1 if segments.n_documents else 0)
