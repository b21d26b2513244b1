"""Add the echo to the outputs of LoRA modules, exactly, also when gradient checkpointing runs a layer twice.

A layer's forward enters the context of the injection now, and again whenever checkpointing replays it.

Hooks live in context managers, so outside an echo pass the model carries no trace of the echo.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..compat.checkpointing import within_recompute
from ..method.layouts import PassLayout
from ..method.network import Delta
from ..method.sites import EchoSite, site_key


class Places:
    """
    Where one run of the layers receives echoes.

    Args:
        layout: of the run: which segment's echo is added at which positions of its flattened input.
        n_positions: number R*A of positions of the run.
        width, n_prefix: A and P of a run over suffixes. A module that sees its keys and values after they left the
            cache (DeepSeek's `kv_b_proj`) runs R rows of P + A tokens.
    """

    def __init__(self, layout: PassLayout, n_positions: int, width: int = 0, n_prefix: int = 0):
        position_J = layout.inject_position_J
        self.segment_J = layout.inject_segment_J
        self.position_by_count = {n_positions: position_J}
        if n_prefix:
            rows = n_positions // width
            self.position_by_count[rows * (n_prefix + width)] = position_J + (position_J // width + 1) * n_prefix
        self.measured: set[str] = set()
        self.off = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Add no echo inside."""
        before, self.off = self.off, True
        try:
            yield
        finally:
            self.off = before


class Injection:
    """
    The echoes of one echo pass.

    Args:
        sites: target modules.
        delta: delta_m (G, o_m) by `site_key`.
    """

    def __init__(self, sites: list[EchoSite], delta: Delta):
        self.delta = delta
        self._squares: dict[str, Tensor] = {}  # of |delta| and |output|, by site
        self._by_layer: dict[int, list[EchoSite]] = {}
        for site in sites:
            self._by_layer.setdefault(site.layer, []).append(site)

    @contextmanager
    def active(self, layers: nn.ModuleList, places: Places) -> Iterator[None]:
        """Add the echoes during the forward inside this context, and during its recomputation later."""
        with ExitStack() as stack:
            for index, sites in self._by_layer.items():
                stack.enter_context(within_recompute(layers[index], lambda sites=sites: self._hooked(sites, places)))
            yield

    def mean_relative_delta(self) -> Float[Tensor, ""]:
        """Mean over modules of |delta| / |output| at the positions that received an echo, without gradient."""
        first = next(iter(self._squares.values())).device  # a model may be split over devices
        squares = torch.stack([square.to(first) for square in self._squares.values()])
        echo, output = squares.sqrt().unbind(1)
        return (echo / output.clamp(min=torch.finfo(torch.float32).tiny)).mean()

    @contextmanager
    def _hooked(self, sites: list[EchoSite], places: Places) -> Iterator[None]:
        handles = [site.module.register_forward_hook(self._hook(site, places)) for site in sites]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, site: EchoSite, places: Places) -> Callable[[nn.Module, tuple, Tensor], Tensor | None]:
        key = site_key(site)

        def add_echo(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            if places.off:
                return None
            flat = output.reshape(-1, output.shape[-1])
            position_J = places.position_by_count.get(len(flat))
            if position_J is None:
                raise ValueError(
                    f"The LoRA module {site.name!r} of layer {site.layer} returned {tuple(output.shape)} for "
                    f"{min(places.position_by_count)} tokens, so an echo cannot be added token by token. Leave it out "
                    f"of `target_modules`, or name other `echo_target_layers`."
                )
            # A model may be split over devices; the echo networks are all on one.
            position_J = position_J.to(flat.device)
            echo_Go = self.delta[key].to(flat.device, flat.dtype)
            echo_Jo = echo_Go.index_select(0, places.segment_J.to(flat.device))
            if key not in places.measured:
                places.measured.add(key)
                self._squares[key] = self._squares.get(key, 0) + _squares(echo_Jo, flat, position_J)
            return flat.index_add(0, position_J, echo_Jo).view_as(output)

        return add_echo


@torch.no_grad()
def _squares(
    echo_Jo: Float[Tensor, "J o"], flat: Float[Tensor, "tokens o"], position_J: Int[Tensor, "J"]
) -> Float[Tensor, "2"]:
    output_Jo = flat.detach().index_select(0, position_J)
    return torch.stack([x.float().square().sum() for x in (echo_Jo.detach(), output_Jo)])
