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

from .injection import Injection
from .layers import EchoSite, decoder_layers
from .layouts import FullLayout, SuffixLayout
from .modules import forward_replaced
from .network import EchoNetworks
from .plan import EchoPlan
from .rows import take_rows
from .suffix_cache import KeyValueRecord, PrefixCache, attach_cache


@dataclass(frozen=True)
class EchoSetup:
    """
    The parts of a model that take part in the echo.

    Attributes:
        model: the causal language model below the PeftModel.
        networks: the echo networks.
        sites: target modules.
        source_layers: S, indices from 0.
    """

    model: nn.Module
    networks: EchoNetworks
    sites: list[EchoSite]
    source_layers: list[int]

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
        outputs: what the backbone returned.
    """

    hidden_Nd: Tensor
    source_SGd: Tensor | None
    record: KeyValueRecord | None
    entry_RAd: Tensor | None
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
    layers = decoder_layers(setup.model)
    sources: dict[int, Tensor] = {}
    entry: list[Tensor] = []
    record = None
    with ExitStack() as stack:
        if plan.layout is not None:
            for index in setup.source_layers:
                keep = _keep_rows(sources, index, plan.boundary_G)
                stack.enter_context(_forward_hook(layers[index], keep))
        if isinstance(plan.layout, SuffixLayout):
            record = KeyValueRecord(plan.layout, first_layer=setup.first_target)
            stack.enter_context(attach_cache(layers, record))
            stack.enter_context(_input_hook(layers[setup.first_target], _keep_entry(entry, plan.layout)))
        outputs = setup.model.base_model(**inputs, use_cache=False)
    return PlainState(
        hidden_Nd=take_rows(outputs.last_hidden_state, plan.predict_N),
        source_SGd=torch.stack([sources[s].to(plan.boundary_G.device) for s in setup.source_layers])
        if sources
        else None,
        record=record,
        entry_RAd=entry[0] if entry else None,
        outputs=outputs,
    )


class FullEchoPass:
    """Run the rows that hold routed samples again, from the embedding on."""

    def __call__(self, setup, inputs, plan, plain, delta):
        """See `EchoPass`."""
        layout: FullLayout = plan.layout
        layers = decoder_layers(setup.model)
        rows = inputs["input_ids"].shape[0]
        selected, layout = _select_rows(inputs, layout, rows)
        n_positions = selected["input_ids"].numel()
        injection = Injection(setup.sites, delta, layout.inject_position_J, layout.inject_segment_J, n_positions)
        with injection.active(layers):
            outputs = setup.model.base_model(**selected, use_cache=False)
        return take_rows(outputs.last_hidden_state, layout.output_position_E), injection


class SuffixEchoPass:
    """Run the suffixes of the routed documents against the recorded keys and values of their prefixes."""

    def __call__(self, setup, inputs, plan, plain, delta):
        """See `EchoPass`."""
        layout: SuffixLayout = plan.layout
        layers = decoder_layers(setup.model)
        cache = PrefixCache(plain.record, n_prefix=layout.prefix_RP.shape[1])
        injection = Injection(
            setup.sites, delta, layout.inject_position_J, layout.inject_segment_J, layout.token_RA.numel()
        )
        with ExitStack() as stack:
            # The backbone gets the cache for its masks; GPT-2 does not hand it on to layers that are checkpointed.
            stack.enter_context(attach_cache(layers, cache))
            stack.enter_context(_start_at(layers, setup.first_target, plain.entry_RAd))
            stack.enter_context(injection.active(layers))
            outputs = setup.model.base_model(
                input_ids=inputs["input_ids"].reshape(-1)[layout.token_RA],
                attention_mask=layout.mask_RK,
                position_ids=layout.position_RA,
                past_key_values=cache,
                use_cache=False,
            )
        return take_rows(outputs.last_hidden_state, layout.output_position_E), injection


def run_echo_pass(
    setup: EchoSetup, inputs: dict[str, Any], plan: EchoPlan, plain: PlainState, delta: dict[str, Tensor]
) -> tuple[Tensor, Injection]:
    """The echo pass in the form that the plan is laid out for."""
    echo_pass: EchoPass = SuffixEchoPass() if isinstance(plan.layout, SuffixLayout) else FullEchoPass()
    return echo_pass(setup, inputs, plan, plain, delta)


def _select_rows(inputs: dict[str, Any], layout: FullLayout, rows: int) -> tuple[dict[str, Any], FullLayout]:
    """The inputs of the routed rows; all rows where an input is not laid out by row (images, padding-free lengths)."""
    if len(layout.row_R) == rows:
        return inputs, layout
    by_row = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
    if all(value.dim() >= 1 and value.shape[0] == rows for value in by_row.values()):
        return {**inputs, **{k: v.index_select(0, layout.row_R) for k, v in by_row.items()}}, layout
    return inputs, layout.with_all_rows(inputs["input_ids"].shape[1])


@contextmanager
def _forward_hook(module: nn.Module, hook: Callable) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _input_hook(module: nn.Module, hook: Callable) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _keep_rows(store: dict[int, Tensor], key: int, index: Tensor) -> Callable:
    """A hook that keeps rows of a layer's output, detached: memory for G rows, not for B*T."""

    def hook(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        store[key] = take_rows(hidden.detach(), index)

    return hook


def _keep_entry(store: list[Tensor], layout: SuffixLayout) -> Callable:
    """A hook that keeps a layer's input at the suffix tokens, with gradient."""

    def hook(module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        store.append(take_rows(hidden, layout.token_RA, layout.real_token))

    return hook


@contextmanager
def _start_at(layers: nn.ModuleList, first: int, entry_RAd: Tensor) -> Iterator[None]:
    """
    Let the backbone begin at layer `first` with `entry_RAd`; the layers below it pass through.

    Below the first target layer the two passes agree, so what the plain pass computed there is used again.
    """

    def replace_input(module, args, kwargs):
        if args:
            return (entry_RAd, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": entry_RAd}

    with ExitStack() as stack:
        for layer in layers[:first]:
            stack.enter_context(forward_replaced(layer, _pass_through))
        stack.enter_context(_input_hook(layers[first], replace_input))
        yield


def _pass_through(hidden_states: Tensor, *args, **kwargs) -> Tensor:
    return hidden_states
