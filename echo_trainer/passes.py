"""The plain pass, and the echo pass in two forms behind one interface.

Shapes: B rows, T tokens, F = B*T; N predicting positions, E of them reached by the echo; S source layers, G routed
segments, d hidden size; in the echo pass R rows of A tokens after P prefix tokens.

- `FullEchoPass` runs the routed rows again.
- `SuffixEchoPass` runs only what follows the first echo, from the first target layer on, against the keys and values
  that the plain pass computed. Same loss, same gradients: the graph of those keys and values is kept.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .compat.cache import CachePlace, KeyValueRecord, PrefixCache, attach_cache
from .injection import Injection
from .layer_io import (
    first_plane,
    form_of,
    forward_hook,
    hidden_of,
    input_hook,
    input_of,
    like,
    planes_first,
    tokens_first,
    with_input,
)
from .layers import EchoSite, backbone, decoder_layers
from .layouts import FullLayout, SuffixLayout
from .modules import forward_replaced
from .network import EchoNetworks
from .plan import EchoPlan
from .rows import take_rows

# Inputs whose rows are the batch's rows. What else a batch may hold (images, lengths) belongs to it in another way.
ROW_INPUTS = {"input_ids", "attention_mask", "position_ids"}


@dataclass
class EchoSetup:
    """
    The parts of a model that take part in the echo.

    Attributes:
        model: the causal language model below the PeftModel.
        networks: the echo networks.
        sites: target modules.
        source_layers: S, indices from 0.
        layers_path: path of the decoder layers in the model, where they cannot be found.
        cache: where the model takes a cache; found by the proof at the first step, None where it takes none.
    """

    model: nn.Module
    networks: EchoNetworks
    sites: list[EchoSite]
    source_layers: list[int]
    layers_path: str | None = None
    cache: CachePlace | None = None

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers; looked up anew, since engines replace modules."""
        return decoder_layers(self.model, self.layers_path)

    @property
    def backbone(self) -> nn.Module:
        """The part of the model below its head."""
        return backbone(self.model, self.layers)

    @property
    def first_target(self) -> int:
        """Index of the lowest target layer; below it both passes are the same."""
        return min(site.layer for site in self.sites)


@dataclass
class PlainState:
    """
    What the plain pass leaves behind.

    Attributes:
        hidden_Nd: final hidden states at the predicting positions, with gradient.
        source_SGd: hidden states of the source layers at the boundaries, without gradient.
        record: keys and values of every layer, where the layout of the echo pass is a suffix.
        entry_RAd: input of the first target layer at the suffix tokens, likewise.
        layer_form: form of what a decoder layer returns, likewise.
        outputs: what the backbone returned.
    """

    hidden_Nd: Tensor
    source_SGd: Tensor | None
    record: KeyValueRecord | None
    entry_RAd: Tensor | None
    layer_form: Any
    outputs: Any


class EchoPass(Protocol):
    """An echo pass: final hidden states (E, d) of the echo-augmented model at the positions the echo reaches."""

    def __call__(
        self, setup: EchoSetup, inputs: dict[str, Any], plan: EchoPlan, plain: PlainState, delta: dict[str, Tensor]
    ) -> tuple[Tensor, Injection]:
        """Run the pass; `delta` holds delta_m (G, o_m) by `site_key`."""


def run_plain_pass(setup: EchoSetup, inputs: dict[str, Any], plan: EchoPlan) -> PlainState:
    """
    Ordinary forward of the adapted backbone that keeps, on the way, what the echo pass needs.

    Args:
        setup: the model and its echo parts.
        inputs: keyword arguments of the backbone, without labels.
        plan: the plan of the batch, on the model's device.
    """
    layers = setup.layers
    shape = inputs["input_ids"].shape
    sources: dict[int, Tensor] = {}
    entry: list[Tensor] = []
    forms: list[Any] = []
    record = None
    with ExitStack() as stack:
        if plan.layout is not None:
            for index in setup.source_layers:
                keep = _keep_rows(sources, index, plan.boundary_G, shape)
                stack.enter_context(forward_hook(layers[index], keep))
        if isinstance(plan.layout, SuffixLayout):
            record = KeyValueRecord(plan.layout, first_layer=setup.first_target)
            stack.enter_context(attach_cache(layers, record, setup.cache))
            first = layers[setup.first_target]
            stack.enter_context(input_hook(first, _keep_entry(entry, plan.layout, shape)))
            stack.enter_context(forward_hook(first, lambda module, args, output: forms.append(form_of(output))))
        outputs = setup.backbone(**inputs, use_cache=False)
    return PlainState(
        hidden_Nd=take_rows(outputs.last_hidden_state, plan.predict_N),
        source_SGd=torch.stack([sources[s].to(plan.boundary_G.device) for s in setup.source_layers])
        if sources
        else None,
        record=record,
        entry_RAd=entry[0] if entry else None,
        layer_form=forms[0] if forms else None,
        outputs=outputs,
    )


class FullEchoPass:
    """Run the rows that hold routed samples again, from the embedding on."""

    def __call__(self, setup, inputs, plan, plain, delta):
        """See `EchoPass`."""
        layout: FullLayout = plan.layout
        if layout.row_R is not None:
            inputs = {**inputs, **{k: v.index_select(0, layout.row_R) for k, v in by_row(inputs).items()}}
        n_positions = inputs["input_ids"].numel()
        injection = Injection(setup.sites, delta, layout.inject_position_J, layout.inject_segment_J, n_positions)
        with injection.active(setup.layers):
            outputs = setup.backbone(**inputs, use_cache=False)
        return take_rows(outputs.last_hidden_state, layout.output_position_E), injection


class SuffixEchoPass:
    """Run the suffixes of the routed documents against the recorded keys and values of their prefixes."""

    def __call__(self, setup, inputs, plan, plain, delta):
        """See `EchoPass`."""
        layout: SuffixLayout = plan.layout
        layers = setup.layers
        rows, width = layout.token_RA.shape
        cache = PrefixCache(plain.record, n_prefix=layout.prefix_RP.shape[1])
        injection = Injection(
            setup.sites,
            delta,
            layout.inject_position_J,
            layout.inject_segment_J,
            n_positions=rows * width,
            width=width,
            n_prefix=cache.n_prefix,
        )
        with ExitStack() as stack:
            # The backbone gets the cache for its masks; GPT-2 does not hand it on to layers that are checkpointed.
            stack.enter_context(attach_cache(layers, cache, setup.cache))
            stack.enter_context(_start_at(layers, setup.first_target, plain))
            stack.enter_context(injection.active(layers))
            outputs = setup.backbone(
                input_ids=inputs["input_ids"].reshape(-1)[layout.token_RA],
                attention_mask=layout.mask_RK,
                position_ids=layout.position_RA,
                use_cache=False,
                **{setup.cache.backbone: cache},
            )
        return take_rows(outputs.last_hidden_state, layout.output_position_E), injection


def by_row(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The inputs that hold one row for each row of the batch; position ids may be one row for all."""
    rows = inputs["input_ids"].shape[0]
    return {k: v for k, v in inputs.items() if k in ROW_INPUTS and isinstance(v, Tensor) and v.shape[0] == rows}


def run_echo_pass(
    setup: EchoSetup, inputs: dict[str, Any], plan: EchoPlan, plain: PlainState, delta: dict[str, Tensor]
) -> tuple[Tensor, Injection]:
    """The echo pass in the form that the plan is laid out for."""
    echo_pass: EchoPass = SuffixEchoPass() if isinstance(plan.layout, SuffixLayout) else FullEchoPass()
    return echo_pass(setup, inputs, plan, plain, delta)


def _keep_rows(store: dict[int, Tensor], key: int, index: Tensor, shape: tuple[int, int]) -> Callable:
    """A hook that keeps rows of a layer's output, detached: memory for G rows, not for B*T."""

    def hook(module, args, output):
        hidden = tokens_first(hidden_of(output).detach(), shape)
        store[key] = first_plane(take_rows(hidden, index))

    return hook


def _keep_entry(store: list[Tensor], layout: SuffixLayout, shape: tuple[int, int]) -> Callable:
    """A hook that keeps a layer's input at the suffix tokens, with gradient."""

    def hook(module, args, kwargs):
        hidden = tokens_first(input_of(args, kwargs), shape)
        store.append(planes_first(take_rows(hidden, layout.token_RA, layout.real_token)))

    return hook


@contextmanager
def _start_at(layers: nn.ModuleList, first: int, plain: PlainState) -> Iterator[None]:
    """
    Let the backbone begin at layer `first` with what the plain pass gave it; the layers below it pass through.

    Below the first target layer the two passes agree, so what the plain pass computed there is used again.
    """

    def pass_through(*args, **kwargs):
        return like(plain.layer_form, input_of(args, kwargs))

    with ExitStack() as stack:
        for layer in layers[:first]:
            stack.enter_context(forward_replaced(layer, pass_through))
        enter = input_hook(layers[first], lambda module, args, kwargs: with_input(args, kwargs, plain.entry_RAd))
        stack.enter_context(enter)
        yield
