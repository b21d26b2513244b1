"""Add the echo to the outputs of LoRA modules, exactly, also when gradient checkpointing runs a layer twice.

A layer's forward enters the context of the injection now, and again whenever checkpointing replays it.

Hooks live in context managers, so outside an echo pass the model carries no trace of the echo.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..compat.checkpointing import within_recompute
from ..method.sites import EchoSite, site_key


class Injection:
    """
    The echoes of one echo pass.

    Args:
        sites: target modules.
        delta: delta_m (G, o_m) by `site_key`.
        position_J, segment_J: where in the flattened input of the pass which segment's echo is added.
        n_positions: number R*A of positions of the pass.
        width, n_prefix: A and P of a suffix pass. A module that sees its keys and values after they left the cache
            (DeepSeek's `kv_b_proj`) runs R rows of P + A tokens.
    """

    def __init__(
        self,
        sites: list[EchoSite],
        delta: dict[str, Tensor],
        position_J: Tensor,
        segment_J: Tensor,
        n_positions: int,
        width: int = 0,
        n_prefix: int = 0,
    ):
        self.delta = delta
        self.segment_J = segment_J
        self.position_by_count = {n_positions: position_J}
        if n_prefix:
            rows = n_positions // width
            self.position_by_count[rows * (n_prefix + width)] = position_J + (position_J // width + 1) * n_prefix
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
        found = list(self.relative.values())
        return torch.stack([norm.to(found[0].device) for norm in found]).mean()

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
            position_J = self.position_by_count.get(len(flat))
            if position_J is None:
                raise ValueError(
                    f"The LoRA module {site.name!r} of layer {site.layer} returned {tuple(output.shape)} for "
                    f"{min(self.position_by_count)} tokens, so an echo cannot be added token by token. Leave it out "
                    f"of `target_modules`, or name other `echo_target_layers`."
                )
            # A model may be split over devices; the echo networks are all on one.
            position_J = position_J.to(flat.device)
            echo_Go = self.delta[key].to(flat.device, flat.dtype)
            echo_Jo = echo_Go.index_select(0, self.segment_J.to(flat.device))
            if key not in self.relative:
                self.relative[key] = _relative_norm(echo_Jo, flat, position_J)
            return flat.index_add(0, position_J, echo_Jo).view_as(output)

        return add_echo


@torch.no_grad()
def _relative_norm(echo_Jo: Tensor, flat: Tensor, position_J: Tensor) -> Tensor:
    output = flat.detach().index_select(0, position_J).float().norm()
    return echo_Jo.detach().float().norm() / output.clamp(min=torch.finfo(torch.float32).tiny)
