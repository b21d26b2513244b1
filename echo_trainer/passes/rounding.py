"""How far rounding alone moves what a model computes, and how to compute it more finely; see `proof.py`.

Shapes: B rows, T tokens, d hidden size.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..method.plan import EchoPlan
from ..method.rows import take_rows
from .layer_io import first_plane, forward_hook, hidden_of, tokens_first
from .modules import forward_replaced
from .setup import EchoSetup


def unit_roundoff(parameters: Iterable[Tensor], device: torch.device, dtype: torch.dtype) -> float:
    """
    u, half the machine epsilon of the coarsest dtype that takes part; at least that of float32.

    Args:
        parameters: of the model. Dtypes of 8 bits and less are those of quantised weights, not of a computation.
        device: where the model computes.
        dtype: of the states it computed.
    """
    dtypes = {p.dtype for p in parameters if p.is_floating_point() and p.dtype.itemsize > 1}
    if torch.is_autocast_enabled(device.type):
        dtypes.add(torch.get_autocast_dtype(device.type))
    epsilon = max(torch.finfo(d).eps for d in (*dtypes, dtype, torch.float32))
    if device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32":
        epsilon = max(epsilon, 2.0**-10)
    return epsilon / 2


def relative(states: Float[Tensor, "*positions d"], reference: Float[Tensor, "*positions d"]) -> float:
    """
    Root mean square over positions of |states - reference| / |reference|; infinite where one of them is NaN.

    Infinities that both have, such as the logits -inf of tokens that a model rules out, do not count.
    """
    if not states.numel():
        return 0.0
    exact = torch.float32 if states.device.type == "mps" else torch.float64  # mps knows no float64
    reference = reference.to(states.device)
    alike = torch.isinf(reference) & (states == reference)
    reference, states = (x.masked_fill(alike, 0.0).to(exact) for x in (reference, states))
    distance = (states - reference).norm(dim=-1) / reference.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return float(distance.square().mean().sqrt().nan_to_num(nan=math.inf))


@contextmanager
def rounding(layers: nn.ModuleList, roundoff: float) -> Iterator[None]:
    """Inside, the output of each of these decoder layers is multiplied by 1 + u or 1 - u at random."""
    generators: dict[torch.device, torch.Generator] = {}

    def disturb(module: nn.Module, args: tuple, output: Any) -> Any:
        hidden = hidden_of(output)
        generator = generators.setdefault(hidden.device, torch.Generator(hidden.device).manual_seed(0))
        sign = torch.empty(hidden.shape, device=hidden.device).bernoulli_(0.5, generator=generator) * 2 - 1
        # In a coarse dtype 1 - u is a number and 1 + u is not: the product is rounded once, from float32.
        moved = (hidden.to(torch.promote_types(hidden.dtype, torch.float32)) * (1 + roundoff * sign)).to(hidden.dtype)
        return type(output)([moved, *output[1:]]) if isinstance(output, tuple | list) else moved

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(forward_hook(layer, disturb))
        yield


def can_refine(setup: EchoSetup) -> bool:
    """Whether weights of half precision can be made float32 layer by layer: neither quantised nor sharded."""
    parameters = [p for layer in setup.layers for p in layer.parameters()]
    return all(
        p.is_floating_point() and p.dtype.itemsize > 1 and not hasattr(p, "device_mesh") and not hasattr(p, "ds_id")
        for p in parameters
    ) and any(p.dtype.itemsize == 2 for p in parameters)


@contextmanager
def layers_in_float32(setup: EchoSetup) -> Iterator[list[Tensor]]:
    """
    Inside, every decoder layer computes in float32, and hands float32 on to the next.

    One layer at a time has its weights in float32, so this takes the memory of one layer. What comes after the last
    layer gets the dtype it knows.

    Yields:
        The hidden states that the last layer returned in each forward so far, in float32.
    """
    layers, finals = list(setup.layers), []

    def last(run: Callable, dtype: torch.dtype) -> Callable:
        def keep(*args: Any, **kwargs: Any) -> Any:
            output = run(*args, **kwargs)
            finals.append(hidden_of(output))
            return _cast(output, dtype)

        return keep

    with ExitStack() as stack:
        for layer in layers:
            run = _refined(layer, layer.forward)
            if layer is layers[-1]:
                run = last(run, next(layer.parameters()).dtype)
            stack.enter_context(forward_replaced(layer, run))
        yield finals


def plain_states(finals: list[Tensor], inputs: dict[str, Any]) -> Float[Tensor, "B T d"]:
    """The states that the last layer returned last, (B, T, d), in the plain pass; takes them from `finals`."""
    return _last(finals, *inputs["input_ids"].shape)


def echo_states(finals: list[Tensor], inputs: dict[str, Any], plan: EchoPlan) -> Float[Tensor, "E d"]:
    """The states (E, d) that the last layer returned last in a plan's echo pass; takes them from `finals`."""
    layout = plan.layout
    assert layout is not None  # there has been an echo pass
    rows, length = inputs["input_ids"].shape
    found = [take_rows(_last(finals, *size), at) for size, at in reversed(layout.outputs((rows, length)))]
    states = torch.cat(found[::-1])
    return states if layout.order_E is None else states[layout.order_E]


def _last(finals: list[Tensor], rows: int, width: int) -> Float[Tensor, "{rows} {width} d"]:
    tokens = tokens_first(finals.pop(), (rows, width))
    return first_plane(tokens.flatten(0, 1)).view(rows, width, -1)


def _refined(layer: nn.Module, forward: Callable) -> Callable:
    """A layer's forward in float32."""

    def run(*args: Any, **kwargs: Any) -> Any:
        tensors = [t for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point()]
        before = [t.data for t in tensors]
        try:
            for t in tensors:
                t.data = t.data.to(torch.promote_types(t.dtype, torch.float32))
            return forward(*_cast(args, torch.float32), **_cast(kwargs, torch.float32))
        finally:
            for t, data in zip(tensors, before, strict=True):
                t.data = data

    return run


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """A value with the floating-point tensors in it in another dtype, unless that would be coarser than float32."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() and value.dtype != torch.float64 else value
    if isinstance(value, tuple | list):
        return type(value)(_cast(each, dtype) for each in value)
    if isinstance(value, dict):
        return {name: _cast(each, dtype) for name, each in value.items()}
    return value
