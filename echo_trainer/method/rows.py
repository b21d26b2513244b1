"""Take rows of a flattened batch and put them elsewhere, with a backward that copies instead of adding.

Shapes: F positions of the flattened batch, K taken ones; R rows of P prefix and A suffix tokens, n prefix tokens of
all rows, H key-value heads, h head size.
"""

from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor


def take_rows(
    states: Shaped[Tensor, "B T *features"], index: Int[Tensor, "*index"], real: Int[Tensor, "places"] | None = None
) -> Shaped[Tensor, "..."]:
    """
    `states` flattened to (F, ...) over its first two dimensions, at `index`: (*index.shape, ...), with gradient.

    Args:
        states: (B, T, ...).
        index: positions in F, any shape. Each position once, padding aside.
        real: positions in the flattened index that are not padding; None if none is. Padding repeats a position, and
            its gradient must be zero, which it is where no loss depends on it.
    """
    flat = states.reshape(-1, *states.shape[2:])
    index = index.to(flat.device)
    taken = _TakeRows.apply(flat, index.reshape(-1), None if real is None else real.to(flat.device))
    return taken.view(*index.shape, *flat.shape[1:])


class _TakeRows(torch.autograd.Function):
    """
    `index_select` for distinct rows.

    The backward of `index_select` must expect repeated rows, so it adds row by row: on a CPU ten times as slow as a
    copy, on a GPU not deterministic.
    """

    @staticmethod
    def forward(
        ctx: Any,
        flat: Shaped[Tensor, "F *features"],
        index_K: Int[Tensor, "K"],
        real: Int[Tensor, "places"] | None,
    ) -> Shaped[Tensor, "K *features"]:
        ctx.save_for_backward(index_K, real)
        ctx.length = flat.shape[0]
        return flat.index_select(0, index_K)

    @staticmethod
    def backward(
        ctx: Any, gradient: Shaped[Tensor, "K *features"]
    ) -> tuple[Shaped[Tensor, "F *features"], None, None]:
        index_K, real = ctx.saved_tensors
        if real is not None:
            index_K, gradient = index_K.index_select(0, real), gradient.index_select(0, real)
        whole = gradient.new_zeros((ctx.length, *gradient.shape[1:]))
        return whole.index_copy_(0, index_K, gradient), None, None


def join_prefix(
    prefix_nHh: Float[Tensor, "n H h"], suffix_RHAh: Float[Tensor, "R H A h"], place_n: Int[Tensor, "n"], n_prefix: int
) -> Float[Tensor, "R H {n_prefix}+A h"]:
    """
    Keys or values of suffixes behind those of their prefixes, (R, H, P + A, h), with gradient; zeros in between.

    Args:
        prefix_nHh: of all rows, one after the other.
        suffix_RHAh: of the suffixes, padded.
        place_n: where each prefix token stands among the flattened (R, P + A).
        n_prefix: P.
    """
    return _JoinPrefix.apply(prefix_nHh, suffix_RHAh, place_n.to(suffix_RHAh.device), n_prefix)


class _JoinPrefix(torch.autograd.Function):
    """Contiguous, as a cache leaves them when it appends: some families look at them through `view`."""

    @staticmethod
    def forward(
        ctx: Any,
        prefix_nHh: Float[Tensor, "n H h"],
        suffix_RHAh: Float[Tensor, "R H A h"],
        place_n: Int[Tensor, "n"],
        n_prefix: int,
    ) -> Float[Tensor, "R H K h"]:
        rows, heads, width, size = suffix_RHAh.shape
        row_n, column_n = place_n // (n_prefix + width), place_n % (n_prefix + width)
        ctx.save_for_backward(row_n, column_n)
        ctx.n_prefix = n_prefix
        joined_RHKh = suffix_RHAh.new_zeros(rows, heads, n_prefix + width, size)
        joined_RHKh[row_n, :, column_n] = prefix_nHh
        joined_RHKh[:, :, n_prefix:] = suffix_RHAh
        return joined_RHKh

    @staticmethod
    def backward(
        ctx: Any, gradient_RHKh: Float[Tensor, "R H K h"]
    ) -> tuple[Float[Tensor, "n H h"], Float[Tensor, "R H A h"], None, None]:
        row_n, column_n = ctx.saved_tensors
        return gradient_RHKh[row_n, :, column_n], gradient_RHKh[:, :, ctx.n_prefix :], None, None
