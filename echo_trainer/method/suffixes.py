"""Lay out the suffix pass: what follows the first echo of each routed document, documents of like length together.

Shapes: F = B*T positions of the batch, E reached positions that predict an answer token, D documents; R rows (routed
documents) of A suffix tokens after P prefix tokens, n prefix tokens of all rows, J positions that receive an echo.
"""

from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from .forms import Reach
from .grouping import group_rows
from .layouts import SuffixLayout, SuffixPart, first_two, position_ids_F
from .segments import Segments


def suffix_layout(reach: Reach, recompute: bool = False) -> SuffixLayout:
    """
    What follows the first echo of each document that holds a reached position.

    Where no position is reached, as many parts of one token as are asked for, one at least.

    Args:
        reach: what to run for.
        recompute: see `SuffixLayout`.
    """
    segments, inject_F, first_D, reached, n_parts = (
        reach.segments, reach.inject_F, reach.first_D, reach.reached, reach.n_parts,
    )  # fmt: skip
    place_F = position_ids_F(segments, reach.position_ids)
    if not len(reached):
        return _filled(SuffixLayout((), recompute=recompute), n_parts or 1, segments, place_F)
    documents, row_E = torch.unique(segments.document_F[reached], return_inverse=True)
    begin_R = first_D[documents]
    # The last answer token predicts nothing, so a suffix ends at the last position that predicts.
    last_R = torch.zeros_like(begin_R).scatter_reduce_(0, row_E, reached, "amax")
    start_R = segments.start_D[documents]
    groups = group_rows(last_R - begin_R + 1, begin_R - start_R, n_parts)
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


def _filled(layout: SuffixLayout, n_parts: int | None, segments: Segments, place_F: Int[Tensor, "F"]) -> SuffixLayout:
    """The layout with parts of one token, without weight, up to `n_parts` in all."""
    n_idle = (n_parts or 0) - len(layout.parts)
    if n_idle <= 0:
        return layout
    _, last = first_two(segments)
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
