"""Gradients of exactly zero that arrive in the usual order: what keeps processes in step where nothing is routed."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def touch(*tensors: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """Zero, a scalar that depends on `tensors`: their gradients are exactly zero, even where they are not finite."""
    return _Touch.apply(*tensors)


class _Touch(torch.autograd.Function):
    """0 * x would be NaN where x is not finite. Shapes are kept, not tensors: an engine may free those meanwhile."""

    @staticmethod
    def forward(ctx: Any, *tensors: Float[Tensor, "..."]) -> Float[Tensor, ""]:
        ctx.like = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Float[Tensor, ""]) -> tuple[Float[Tensor, "..."] | None, ...]:
        return tuple(
            torch.zeros(shape, dtype=dtype, device=device) if needed else None
            for (shape, dtype, device), needed in zip(ctx.like, ctx.needs_input_grad, strict=True)
        )


def silenced(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Zeros of the shape of `x`, whose graph is kept and gets a gradient of zero, in the order of an ordinary pass."""
    return _Silenced.apply(x)


class _Silenced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return torch.zeros_like(gradient)
