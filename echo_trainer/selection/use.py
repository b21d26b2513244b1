"""What a selection of layers is used for: sources and targets of echoes; and baseline choices to compare with."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..config import EchoSFTConfig
from ..method.depth import CKA
from ..passes.layers import adapted_layers
from .select import LayerSelection, select_layers


def echo_layers(selection: LayerSelection, *, adapted: Sequence[int] | None = None) -> tuple[list[int], list[int]]:
    """Source and target layers of Echo-LoRA by importance: (sources, targets), both sorted.

    Targets are the most important layers of the shallow half, sources the most important of the deep half; an eighth
    of the layers each (4 of 32, as the default by depth has), at least one, every target below every source.

    Args:
        selection: of the model to be trained.
        adapted: layers that hold LoRA modules, when not all do (for example `selection.layers`): targets are chosen
            among them, since the echo is added to LoRA outputs. Sources are only read.

    Raises:
        ValueError: a model of one layer, or no adapted layer below the last one.
    """
    depth = selection.num_layers
    count = max(1, round(depth / 8))
    # an undefined CKA says nothing about a layer: it is taken last
    ranking = sorted(range(depth), key=lambda i: (i in selection.constant, -selection.importance[i]))
    allowed = [i for i in ranking if i < depth - 1 and (adapted is None or i in adapted)]
    if not allowed:
        raise ValueError(
            f"the echo goes from a deep layer to a shallower one that has an adapter, and of the {depth} layers only "
            f"{sorted(adapted) if adapted is not None else 'the last'} may have one; adapt one below the last"
        )
    shallow = [i for i in allowed if i < depth // 2]
    targets = sorted(shallow[:count] or [min(allowed)])
    deep = [i for i in ranking if i >= max(depth // 2, targets[-1] + 1)]
    return sorted(deep[:count]), targets


def named_layers(
    args: EchoSFTConfig, model: nn.Module, dataset: Any, processing_class: Any
) -> tuple[list[int] | str | None, list[int] | str | None]:
    """
    Source and target layers as the user named them, with each "cka" replaced by what layer selection chooses.

    Args:
        args: the options; `seed` is that of the samples that are looked at.
        model: the model with its adapter.
        dataset, processing_class: training data and tokenizer.
    """
    sources, targets, path = args.echo_source_layers, args.echo_target_layers, args.echo_layers
    if sources != CKA and targets != CKA:
        return sources, targets
    selection = select_layers(model, dataset, processing_class=processing_class, seed=args.seed, blocks_path=path)
    deep, shallow = echo_layers(selection, adapted=adapted_layers(model, path))
    return deep if sources == CKA else sources, shallow if targets == CKA else targets


def first_half_plus_last(depth: int, count: int, seed: int = 0) -> list[int]:
    """The first `count` - 1 layers and the last one: nearly what CKA chose in the published decoders."""
    return sorted({*range(count - 1), depth - 1})


def last_n(depth: int, count: int, seed: int = 0) -> list[int]:
    """The last `count` layers; the only choice that shortens the backward pass."""
    return list(range(depth - count, depth))


def random_n(depth: int, count: int, seed: int = 0) -> list[int]:
    """`count` layers drawn by `seed`."""
    return sorted(torch.randperm(depth, generator=torch.Generator().manual_seed(seed))[:count].tolist())


def uniform_n(depth: int, count: int, seed: int = 0) -> list[int]:
    """`count` layers at equal distances, each in the middle of its share of the depth."""
    return [(2 * k + 1) * depth // (2 * count) for k in range(count)]


BASELINES: dict[str, Callable[[int, int, int], list[int]]] = {
    "first-half-plus-last": first_half_plus_last,
    "last": last_n,
    "random": random_n,
    "uniform": uniform_n,
}


def baseline_layers(name: str, depth: int, count: int, seed: int = 0) -> list[int]:
    """Layers of a baseline by its name, `count` of `depth`; only "random" uses the seed.

    Raises:
        ValueError: an unknown name, or a count outside 1..depth.
    """
    if name not in BASELINES:
        raise ValueError(f"baseline {name!r} is unknown; use one of {', '.join(BASELINES)}")
    if not 1 <= count <= depth:
        raise ValueError(f"count={count} layers were asked for, of a model that has {depth}; use 1 to {depth}")
    return BASELINES[name](depth, count, seed)
