"""Take rows of a flattened batch, with a backward that copies instead of adding.

Shapes: F positions of the flattened batch, K taken ones.
"""

import torch
from torch import Tensor


def take_rows(states: Tensor, index: Tensor, real: Tensor | None = None) -> Tensor:
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
    def forward(ctx, flat: Tensor, index_K: Tensor, real: Tensor | None) -> Tensor:
        ctx.save_for_backward(index_K, real)
        ctx.length = flat.shape[0]
        return flat.index_select(0, index_K)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        index_K, real = ctx.saved_tensors
        if real is not None:
            index_K, gradient = index_K.index_select(0, real), gradient.index_select(0, real)
        whole = gradient.new_zeros((ctx.length, *gradient.shape[1:]))
        return whole.index_copy_(0, index_K, gradient), None, None
