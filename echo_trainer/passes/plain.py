"""The plain pass: the ordinary forward, which keeps on its way what the echo pass needs.

Shapes: B rows, T tokens, F = B*T; N predicting positions; S source layers, G routed segments, d hidden size; in the
echo pass R rows of A tokens after P prefix tokens.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..compat.cache import KeyValueRecord, attach_cache
from ..compat.checkpointing import is_checkpointed
from ..compat.replay import KeyValueReplay
from ..method.layouts import SuffixLayout
from ..method.plan import EchoPlan
from ..method.rows import take_rows
from .layer_io import (
    first_plane,
    form_of,
    forward_hook,
    hidden_of,
    input_hook,
    input_of,
    planes_first,
    tokens_first,
)
from .setup import EchoSetup


@dataclass
class PlainState:
    """
    What the plain pass leaves behind.

    Attributes:
        hidden_Nd: final hidden states at the predicting positions, with gradient. Their size is d, except in a model
            that projects them before the head (OPT).
        source_SGd: hidden states of the source layers at the boundaries, with gradient unless `EchoSetup.detach`.
        prefix: keys and values of the prefixes in every layer, where the echo pass runs suffixes: those of the plain
            pass, or where only the layers' inputs are kept, those computed from them again.
        entries: input of the first target layer at the suffix tokens of each part (R, A, d), likewise.
        layer_form: form of what a decoder layer returns, likewise.
        outputs: what the backbone returned.
    """

    hidden_Nd: Float[Tensor, "N _"]
    source_SGd: Float[Tensor, "S G d"] | None
    prefix: KeyValueRecord | KeyValueReplay | None
    entries: list[Float[Tensor, "*planes _ _ d"]]
    layer_form: Any
    outputs: Any


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
    entries: list[Tensor] = []
    forms: list[Any] = []
    prefix = None
    with ExitStack() as stack:
        if plan.layout is not None:
            for index in setup.source_layers:
                keep = _keep_rows(sources, index, plan.boundary_G, shape, setup.detach)
                stack.enter_context(forward_hook(layers[index], keep))
        if (suffixes := plan.suffixes) is not None:
            assert setup.cache is not None  # the proof of the suffix pass has found it
            first = layers[setup.first_target]
            if suffixes.recompute and is_checkpointed(first):
                given = (setup.cache, setup.first_target, setup.unneeded)
                prefix = KeyValueReplay(suffixes.parts, shape, layers, *given)
                stack.enter_context(prefix.watching())
            else:
                prefix = KeyValueRecord(suffixes.parts, setup.first_target, whole=suffixes.recompute)
                stack.enter_context(attach_cache(layers, prefix, setup.cache))
            stack.enter_context(input_hook(first, _keep_entries(entries, suffixes, shape)))
            stack.enter_context(forward_hook(first, lambda module, args, output: forms.append(form_of(output))))
        outputs = setup.backbone(**inputs, use_cache=False)
    return PlainState(
        hidden_Nd=take_rows(outputs.last_hidden_state, plan.predict_N),
        source_SGd=torch.stack([sources[s].to(plan.boundary_G.device) for s in setup.source_layers])
        if sources
        else None,
        prefix=prefix,
        entries=entries,
        layer_form=forms[0] if forms else None,
        outputs=outputs,
    )


def _keep_rows(
    store: dict[int, Tensor], key: int, index: Int[Tensor, "G"], shape: tuple[int, int], detach: bool
) -> Callable:
    """A hook that keeps rows of a layer's output: memory for G rows, not for B*T."""

    def hook(module, args, output):
        hidden = hidden_of(output)
        hidden = tokens_first(hidden.detach() if detach else hidden, shape)
        store[key] = first_plane(take_rows(hidden, index))

    return hook


def _keep_entries(store: list[Tensor], layout: SuffixLayout, shape: tuple[int, int]) -> Callable:
    """A hook that keeps a layer's input at the suffix tokens of each part, with gradient."""

    def hook(module, args, kwargs):
        hidden = tokens_first(input_of(args, kwargs), shape)
        store.extend(planes_first(take_rows(hidden, part.token_RA, part.real_token)) for part in layout.parts)

    return hook
