"""Whether a frozen prefix is the model's own forward, seen on the user's model and a batch of the run.

Nothing below the first trained layer is trained or random, the states of a document alone are those it has in the
batch up to rounding, and what lies above makes the same of the states, whatever else the layers below have computed.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .frozen import Documents, FrozenPrefix, FrozenPrefixError
from .layer_io import input_hook
from .memory import is_out_of_memory
from .rounding import relative, rounding, unit_roundoff

SAFETY = 8
"""As many times what rounding alone moves the states may they differ from those in the batch."""


@torch.no_grad()
def prove_prefix(prefix: FrozenPrefix, inputs: dict[str, Any], documents: Documents) -> None:
    """
    Compare with the model's own forward on a batch; random numbers are as before afterwards.

    Args:
        prefix: of the model, which is in training mode.
        inputs: keyword arguments of the backbone.
        documents: of the batch.

    Raises:
        FrozenPrefixError: something below the first trained layer is trained or random, the states of a document
            depend on what is beside it, or something above depends on more than the states.
    """
    device = inputs["input_ids"].device
    streams: dict[str, Any] = {"devices": []}
    if device.type != "cpu":
        streams = {"devices": [device], "device_type": device.type}
    inputs = {**inputs, "use_cache": False}
    with torch.random.fork_rng(**streams):
        with torch.random.fork_rng(**streams), _nothing_trained_below(prefix):
            states, final = prefix.observe(inputs)
            again, _ = prefix.observe(inputs)
        if not torch.equal(states, again):
            raise FrozenPrefixError(
                f"Two forwards of {_name(prefix)} give layer {prefix.start} different inputs, so something below it "
                f"draws random numbers (dropout of the base, NEFTune), and what they compute is not the same in every "
                f"epoch. Set that to 0, or leave `frozen_prefix_cache` out."
            )
        own_Md = states.flatten(0, 1).index_select(0, documents.position_M.to(states.device))
        with torch.random.fork_rng(**streams):
            _compare_above(prefix, inputs, documents, own_Md, final)
        _compare_alone(prefix, inputs, documents, own_Md)
    prefix.proved = True


def _compare_above(
    prefix: FrozenPrefix,
    inputs: dict[str, Any],
    documents: Documents,
    own_Md: Float[Tensor, "M *planes d"],
    final: Float[Tensor, "B T _"],
) -> None:
    why = None
    try:
        with prefix.entering([own_Md], documents, inputs["input_ids"].shape):
            entered = prefix.backbone(**inputs).last_hidden_state
    except Exception as error:
        if is_out_of_memory(error):
            raise
        why = f"{type(error).__name__}: {error}"
    else:
        position_M = documents.position_M.to(final.device)
        ours, own = (x.flatten(0, 1).index_select(0, position_M) for x in (entered, final))
        # The same kernels on the same numbers; those that add in any order may differ in the last digit.
        if not torch.equal(ours, own) and not relative(ours, own) <= unit_roundoff([], own.device, own.dtype):
            why = f"relative difference {relative(ours, own):.1e}"
    if why is not None:
        raise FrozenPrefixError(
            f"{_name(prefix)} does not compute the same from the states at layer {prefix.start} alone ({why}): its "
            f"upper layers take something else from those below. Leave `frozen_prefix_cache` out."
        )


def _compare_alone(
    prefix: FrozenPrefix, inputs: dict[str, Any], documents: Documents, own_Md: Float[Tensor, "M *planes d"]
) -> None:
    roundoff = unit_roundoff(prefix.backbone.parameters(), own_Md.device, own_Md.dtype)
    with rounding(prefix.layers, roundoff):
        rounded = prefix.observe(inputs)[0].flatten(0, 1)
    noise = relative(rounded.index_select(0, documents.position_M.to(rounded.device)), own_Md)
    difference = relative(torch.cat(prefix.states(inputs, documents)).to(own_Md.device), own_Md)
    if not difference <= SAFETY * max(noise, roundoff):
        raise FrozenPrefixError(
            f"{_name(prefix)} gives layer {prefix.start} other states for a document in its batch than for the "
            f"document alone (relative difference {difference:.1e}, rounding makes {noise:.1e}): it sees across "
            f"packed documents on this attention kernel, or tokens have places that depend on the batch. Leave "
            f"`frozen_prefix_cache` out, or do not pack."
        )


@contextmanager
def _nothing_trained_below(prefix: FrozenPrefix) -> Iterator[None]:
    """Refuse modules with trained weights that run before the first trained layer does."""
    layers = prefix.layers
    inside = {id(module) for module in layers.modules()}
    below: list[str] = []
    reached = False

    def reach(*_: Any) -> None:
        nonlocal reached
        reached = True

    def watch(name: str, module: nn.Module) -> None:
        def note(*_: Any) -> None:
            if not reached:
                below.append(name)

        stack.enter_context(input_hook(module, note))

    with ExitStack() as stack:
        stack.enter_context(input_hook(layers[prefix.start], reach))
        for name, module in prefix.backbone.named_modules():
            holds_the_layers = any(child is layers for child in module.modules())
            if id(module) in inside or holds_the_layers or not any(p.requires_grad for p in module.parameters()):
                continue
            watch(name, module)
        yield
    if below:
        raise FrozenPrefixError(
            f"{below[0]!r} has trained weights and runs below layer {prefix.start}, so what reaches that layer "
            f"changes with every step. Train nothing below it (new tokens and saved embeddings do), or leave "
            f"`frozen_prefix_cache` out."
        )


def _name(prefix: FrozenPrefix) -> str:
    return type(prefix.backbone).__name__
