"""Gradients of exactly zero that arrive in the usual order: what keeps processes in step where nothing is routed."""

import torch
from torch import Tensor


def touch(*tensors: Tensor) -> Tensor:
    """Zero, a scalar that depends on `tensors`: their gradients are exactly zero, even where they are not finite."""
    return _Touch.apply(*tensors)


class _Touch(torch.autograd.Function):
    """0 * x would be NaN where x is not finite. Shapes are kept, not tensors: an engine may free those meanwhile."""

    @staticmethod
    def forward(ctx, *tensors: Tensor) -> Tensor:
        ctx.like = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx, _):
        return tuple(
            torch.zeros(shape, dtype=dtype, device=device) if needed else None
            for (shape, dtype, device), needed in zip(ctx.like, ctx.needs_input_grad, strict=True)
        )


def silenced(x: Tensor) -> Tensor:
    """Zeros of the shape of `x`, whose graph is kept and gets a gradient of zero, in the order of an ordinary pass."""
    return _Silenced.apply(x)


class _Silenced(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient)
