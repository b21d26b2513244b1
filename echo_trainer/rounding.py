"""How far rounding alone moves what a model computes; see `proof.py`.

Shapes: B rows, T tokens, d hidden size.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .layer_io import forward_hook, hidden_of
from .passes import EchoSetup


def unit_roundoff(setup: EchoSetup, dtype: torch.dtype) -> float:
    """
    u, half the machine epsilon of the coarsest dtype that takes part; at least that of float32.

    Args:
        setup: the model. Dtypes of 8 bits and less are those of quantised weights, not of a computation.
        dtype: of the states the model computed.
    """
    device = setup.model.device.type
    dtypes = {p.dtype for p in setup.model.parameters() if p.is_floating_point() and p.dtype.itemsize > 1}
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    epsilon = max(torch.finfo(d).eps for d in (*dtypes, dtype, torch.float32))
    if device == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        epsilon = max(epsilon, 2.0**-10)
    return epsilon / 2


def relative(states: Tensor, reference: Tensor) -> float:
    """Root mean square over positions of |states - reference| / |reference|; infinite where one of them is NaN."""
    if not states.numel():
        return 0.0
    reference, states = reference.double(), states.double()
    distance = (states - reference).norm(dim=-1) / reference.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return float(distance.square().mean().sqrt().nan_to_num(nan=math.inf))


def run_with_rounding(setup: EchoSetup, inputs: dict[str, Any], roundoff: float) -> Tensor:
    """Final states (B, T, d) of the plain pass with each layer's output multiplied by 1 + u or 1 - u at random."""
    generator = torch.Generator(setup.model.device).manual_seed(0)

    def disturb(module: nn.Module, args: tuple, output: Any) -> Any:
        hidden = hidden_of(output)
        sign = torch.empty(hidden.shape, device=hidden.device).bernoulli_(0.5, generator=generator) * 2 - 1
        # In a coarse dtype 1 - u is a number and 1 + u is not: the product is rounded once, from float32.
        moved = (hidden.to(torch.promote_types(hidden.dtype, torch.float32)) * (1 + roundoff * sign)).to(hidden.dtype)
        return type(output)([moved, *output[1:]]) if isinstance(output, tuple | list) else moved

    with _on_all(setup.layers, disturb):
        return setup.backbone(**inputs, use_cache=False).last_hidden_state


@contextmanager
def _on_all(modules: nn.ModuleList, hook: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(forward_hook(module, hook))
        yield
