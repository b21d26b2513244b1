"""Add the echo to the outputs of LoRA modules, exactly, also when gradient checkpointing runs a layer twice.

Non-reentrant checkpointing computes a layer again during backward, when the forward pass and everything it set up are
long gone. What a layer's forward depends on must therefore travel with the checkpointed function:
`within_recompute` makes a layer enter a context now and again whenever its forward is replayed.

Hooks live in context managers, so outside an echo pass the model carries no trace of the echo.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor, nn

from .layers import EchoSite
from .network import site_key


class Injection:
    """
    The echoes of one echo pass.

    Args:
        sites: target modules.
        delta: delta_m (G, o_m) by `site_key`.
        position_J, segment_J: where in the flattened input of the pass which segment's echo is added.
        n_positions: number R*A of positions of the pass.
    """

    def __init__(
        self, sites: list[EchoSite], delta: dict[str, Tensor], position_J: Tensor, segment_J: Tensor, n_positions: int
    ):
        self.delta = delta
        self.position_J = position_J
        self.segment_J = segment_J
        self.n_positions = n_positions
        self.relative: dict[str, Tensor] = {}
        self._by_layer: dict[int, list[EchoSite]] = {}
        for site in sites:
            self._by_layer.setdefault(site.layer, []).append(site)

    @contextmanager
    def active(self, layers: nn.ModuleList) -> Iterator[None]:
        """Add the echoes during the forward inside this context, and during its recomputation later."""
        with ExitStack() as stack:
            for index, sites in self._by_layer.items():
                stack.enter_context(within_recompute(layers[index], lambda sites=sites: self._hooked(sites)))
            yield

    def mean_relative_delta(self) -> Tensor:
        """Mean over modules of |delta| / |output| at the positions that received an echo, without gradient."""
        return torch.stack(list(self.relative.values())).mean()

    @contextmanager
    def _hooked(self, sites: list[EchoSite]) -> Iterator[None]:
        handles = [site.module.register_forward_hook(self._hook(site)) for site in sites]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, site: EchoSite) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
        key = site_key(site)

        def add_echo(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            flat = output.reshape(-1, output.shape[-1])
            if len(flat) != self.n_positions:
                raise ValueError(
                    f"The LoRA module {site.name!r} of layer {site.layer} returned {tuple(output.shape)} for "
                    f"{self.n_positions} tokens, so an echo cannot be added token by token. Leave it out of "
                    f"`target_modules`, or name other `echo_target_layers`."
                )
            echo_Jo = self.delta[key].to(flat.dtype).index_select(0, self.segment_J)
            if key not in self.relative:
                self.relative[key] = _relative_norm(echo_Jo, flat, self.position_J)
            return flat.index_add(0, self.position_J, echo_Jo).view_as(output)

        return add_echo


@contextmanager
def within_recompute(layer: nn.Module, context: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """
    Run `layer`'s forward inside `context()`, now and whenever checkpointing replays it.

    Args:
        layer: a decoder layer (`GradientCheckpointingLayer` of transformers).
        context: makes a fresh context manager for each run.
    """
    if not (layer.training and getattr(layer, "gradient_checkpointing", False)):
        with context():
            yield
        return
    checkpoint = layer._gradient_checkpointing_func

    def checkpoint_within(forward, *args, **kwargs):
        def forward_within(*inner_args, **inner_kwargs):
            with context():
                return forward(*inner_args, **inner_kwargs)

        return checkpoint(forward_within, *args, **kwargs)

    layer._gradient_checkpointing_func = checkpoint_within
    try:
        yield
    finally:
        layer._gradient_checkpointing_func = checkpoint


@torch.no_grad()
def _relative_norm(echo_Jo: Tensor, flat: Tensor, position_J: Tensor) -> Tensor:
    output = flat.detach().index_select(0, position_J).float().norm()
    return echo_Jo.detach().float().norm() / output.clamp(min=torch.finfo(torch.float32).tiny)
