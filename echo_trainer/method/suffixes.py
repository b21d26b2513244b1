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
from .segments import Segments, spans


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
    document_E = torch.searchsorted(segments.start_D, reached, right=True) - 1
    documents, count_R = torch.unique_consecutive(document_E, return_counts=True)
    begin_R, start_R = first_D[documents], segments.start_D[documents]
    # The last answer token predicts nothing, so a suffix ends at the last position that predicts.
    end_R = count_R.cumsum(0)
    last_R = reached[end_R - 1]
    groups = group_rows(last_R - begin_R + 1, begin_R - start_R, n_parts)
    largest = int(place_F.max())
    # Positions are in the order of their rows, so those of a group are a few spans.
    at_groups = [spans(end_R[rows] - count_R[rows], count_R[rows]) for rows in groups]
    parts = tuple(
        _part(begin_R[rows], last_R[rows], start_R[rows], count_R[rows], reached[at], inject_F, place_F, largest)
        for rows, at in zip(groups, at_groups, strict=True)
    )
    order_E = None
    if len(parts) > 1:
        at_E = torch.cat(at_groups)
        order_E = torch.empty_like(at_E)
        order_E[at_E] = torch.arange(len(at_E))
    return _filled(SuffixLayout(parts, order_E, recompute=recompute), n_parts, segments, place_F)


def _part(
    begin_R: Int[Tensor, "R"],
    last_R: Int[Tensor, "R"],
    start_R: Int[Tensor, "R"],
    count_R: Int[Tensor, "R"],
    reached: Int[Tensor, "E"],
    inject_F: Int[Tensor, "F"],
    place_F: Int[Tensor, "F"],
    largest: int,
) -> SuffixPart:
    """One pass over the suffixes begin .. last of documents from `start_R` on, which have `count_R` of `reached`."""
    length_R, prefix_R = last_R - begin_R + 1, begin_R - start_R
    longest, n_prefix = int(length_R.max()), max(int(prefix_R.max()), 1)  # a cache of no width is a special case
    # The largest position id needs a place of padding. Where no row is shorter than the longest: a column, or a row
    # of its own where that is less.
    level = bool(length_R.eq(longest).all())
    width, spare = longest + int(level and len(length_R) <= longest), int(level and len(length_R) > longest)
    row_R, n_keys = torch.arange(len(begin_R)), n_prefix + width
    output_E = reached + (row_R * width - begin_R).repeat_interleave(count_R)
    prefix_n = spans(start_R, prefix_R)
    place_n = spans(row_R * n_keys + n_prefix - prefix_R, prefix_R)
    if spare:
        begin_R, last_R = (torch.cat([x_R, x_R[:1]]) for x_R in (begin_R, last_R))
        length_R, prefix_R = (torch.cat([x_R, x_R.new_zeros(1)]) for x_R in (length_R, prefix_R))

    offset_K = torch.arange(-n_prefix, width)
    offset_A = offset_K[n_prefix:]
    token_RA = torch.minimum(begin_R[:, None] + offset_A, last_R[:, None])
    padding_RA = offset_A.ge(length_R[:, None])
    # A token that sees nothing, not itself either, is NaN.
    mask_RK = offset_K.ge(-prefix_R[:, None]).logical_and_(offset_K.lt(length_R[:, None].clamp(min=1)))
    inject_RA = inject_F[token_RA].masked_fill_(padding_RA, -1).view(-1)
    inject = inject_RA.ge(0).nonzero().flatten()
    return SuffixPart(
        token_RA=token_RA,
        position_RA=place_F[token_RA].masked_fill_(padding_RA, largest),
        mask_RK=mask_RK.long(),
        real_token=padding_RA.logical_not().view(-1).nonzero().flatten(),
        prefix_n=prefix_n,
        place_n=place_n,
        n_prefix=n_prefix,
        inject_position_J=inject,
        inject_segment_J=inject_RA[inject],
        output_position_E=output_E,
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
