"""The suffix echo pass: only what follows the first echo, from the first target layer on.

Shapes: R rows of A suffix tokens after P prefix tokens, E positions that the echo reaches, d hidden size.

It runs against the keys and values that the plain pass computed. Same loss, same gradients: the graph of those keys
and values is kept. Suffixes of like length run together, one part of the layout after the other.

Where the layout says so, every layer keeps its input alone for backward, its keys and values are joined to those of
the prefixes inside what is computed again, and with gradient checkpointing those of the prefixes are computed there.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..compat.cache import PrefixCache, attach_cache
from ..compat.checkpointing import checkpointed
from ..method.forms import EchoForm
from ..method.layouts import SuffixLayout, SuffixPart
from ..method.network import Delta
from ..method.plan import EchoPlan
from ..method.rows import take_rows
from ..method.silence import touch
from ..method.suffixes import suffix_layout
from .injection import Injection, Places
from .layer_io import input_hook, input_of, like, with_input
from .modules import forward_replaced
from .plain import PlainState
from .setup import EchoSetup


def run_suffixes(
    setup: EchoSetup, inputs: dict[str, Any], plan: EchoPlan, plain: PlainState, delta: Delta
) -> tuple[Float[Tensor, "E d"], Injection]:
    """Run the suffixes of the routed documents on the recorded keys and values of their prefixes; see `EchoPass`."""
    layout = plan.layout
    assert isinstance(layout, SuffixLayout)
    injection = Injection(setup.sites, delta)
    with checkpointed(list(setup.layers)[setup.first_target :]) if layout.recompute else nullcontext():
        hidden = [_run_part(setup, inputs, plain, number, part, injection) for number, part in enumerate(layout.parts)]
    n_real = len(hidden) - layout.n_idle
    if n_real == 0:
        return torch.cat(hidden), injection
    hidden_Ed = torch.cat(hidden[:n_real])
    if layout.order_E is not None:
        hidden_Ed = take_rows(hidden_Ed[None], layout.order_E)
    if layout.n_idle:
        hidden_Ed = hidden_Ed + touch(*hidden[n_real:])
    return hidden_Ed, injection


def _run_part(
    setup: EchoSetup, inputs: dict[str, Any], plain: PlainState, number: int, part: SuffixPart, injection: Injection
) -> Float[Tensor, "E d"]:
    """Final hidden states (E, d) of one part."""
    assert plain.prefix is not None and setup.cache is not None  # the proof has found where a cache goes
    layers = setup.layers
    rows, width = part.token_RA.shape
    places, source = Places(part, rows * width, width, part.n_prefix), plain.prefix
    assert source is not None and setup.cache is not None  # the proof has found where a cache goes

    # Kept until the layers have been computed again, so it must not hold more of the plain pass than it needs.
    def prefix(layer_idx: int) -> tuple[Tensor, Tensor]:
        with places.paused():  # a layer may run for its keys and values, and the prefix has no echo
            return source.of(layer_idx, number)

    cache = PrefixCache(part, prefix)
    with ExitStack() as stack:
        # The backbone gets the cache for its masks; GPT-2 does not hand it on to layers that are checkpointed.
        stack.enter_context(attach_cache(layers, cache, setup.cache))
        stack.enter_context(_start_at(layers, setup.first_target, plain.entries[number], plain.layer_form))
        stack.enter_context(injection.active(layers, places))
        outputs = setup.backbone(
            input_ids=inputs["input_ids"].reshape(-1)[part.token_RA],
            attention_mask=part.mask_RK,
            position_ids=part.position_RA,
            use_cache=False,
            **{setup.cache.backbone: cache},
        )
    return take_rows(outputs.last_hidden_state, part.output_position_E)


@contextmanager
def _start_at(
    layers: nn.ModuleList, first: int, entry_RAd: Float[Tensor, "*planes R A d"], layer_form: Any
) -> Iterator[None]:
    """
    Let the backbone begin at layer `first` with what the plain pass gave it; the layers below it pass through.

    Below the first target layer the two passes agree, so what the plain pass computed there is used again.
    """

    def pass_through(*args, **kwargs):
        return like(layer_form, input_of(args, kwargs))

    with ExitStack() as stack:
        for layer in layers[:first]:
            stack.enter_context(forward_replaced(layer, pass_through))
        enter = input_hook(layers[first], lambda module, args, kwargs: with_input(args, kwargs, entry_RAd))
        stack.enter_context(enter)
        yield


SUFFIX = EchoForm(
    name="suffix",
    option="suffix",
    says="answer tokens only, on the prompt's keys and values of the plain pass",
    lay_out=suffix_layout,
    run=run_suffixes,
    lighter="echo_memory='recompute', which keeps next to nothing of the echo pass for backward",
    instead="keeps what it computes for backward from here on, since computing it again",
    runs_suffixes=True,
)
"""What follows the first echo of each routed document."""

RECOMPUTED = replace(
    SUFFIX,
    name="suffix, recomputed",
    lay_out=partial(suffix_layout, recompute=True),
    lighter=None,
    recomputes=True,
)
"""The same, which keeps next to nothing for backward and computes it again then."""
