"""The suffix echo pass: only what follows the first echo, from the first target layer on.

Shapes: R rows of A suffix tokens after P prefix tokens, E positions that the echo reaches, d hidden size.

It runs against the keys and values that the plain pass computed. Same loss, same gradients: the graph of those keys
and values is kept.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from ..compat.cache import PrefixCache, attach_cache
from ..method.layouts import SuffixLayout
from ..method.rows import take_rows
from .injection import Injection
from .layer_io import input_hook, input_of, like, with_input
from .modules import forward_replaced
from .plain import PlainState


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


@contextmanager
def _start_at(layers: nn.ModuleList, first: int, plain: PlainState) -> Iterator[None]:
    """
    Let the backbone begin at layer `first` with what the plain pass gave it; the layers below it pass through.

    Below the first target layer the two passes agree, so what the plain pass computed there is used again.
    """

    def pass_through(*args, **kwargs):
        return like(plain.layer_form, input_of(args, kwargs))

    entry_RAd = plain.entry_RAd
    assert entry_RAd is not None  # kept where the layout is a suffix
    with ExitStack() as stack:
        for layer in layers[:first]:
            stack.enter_context(forward_replaced(layer, pass_through))
        enter = input_hook(layers[first], lambda module, args, kwargs: with_input(args, kwargs, entry_RAd))
        stack.enter_context(enter)
        yield
