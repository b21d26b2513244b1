"""What a set of layers is used for: `LoraConfig` fields, echo layers; and baseline choices to compare with."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..compat.peft import targets
from ..passes.layers import decoder_layers, lora_sites
from .representations import base_model_of, find_blocks
from .select import LayerSelection, select_layers


def lora_config_kwargs(
    model: nn.Module, layers: Sequence[int], target_modules: str | Sequence[str] = "all-linear"
) -> dict[str, Any]:
    """Fields of `peft.LoraConfig` that adapt `target_modules` in `layers` and nowhere else.

    PEFT refuses `layers_to_transform` beside a string target such as "all-linear", and reads the layer from the first
    number in a module's name, which in a vision-language model is also that of a vision block. So a string is resolved
    to a list of module-name suffixes, and `layers_pattern` is added where the suffixes alone would reach other stacks.

    Args:
        model: the model to be adapted; before or after PEFT wrapped it.
        layers: layer indices from 0, any order.
        target_modules: "all-linear" (every linear module inside the blocks), or a list of module-name suffixes.

    Returns:
        `target_modules` (sorted list), `layers_to_transform` (sorted list), perhaps `layers_pattern`.

    Raises:
        ValueError: a layer outside the model, a regular expression, a suffix that no block has, or names that no
            `layers_pattern` can tell apart.
    """
    blocks, base = find_blocks(model), base_model_of(model)
    outside = [i for i in layers if not 0 <= i < len(blocks)]
    if outside or not layers:
        raise ValueError(f"layers={list(layers)} must name some of the {len(blocks)} layers, 0 to {len(blocks) - 1}")
    if isinstance(target_modules, str) and target_modules != "all-linear":
        raise ValueError(
            f"target_modules={target_modules!r} is a regular expression, which PEFT refuses beside "
            'layers_to_transform; write "all-linear" or a list of module names such as ["q_proj", "v_proj"]'
        )
    inside = _linear_names(blocks.modules)
    if target_modules == "all-linear":
        targets = sorted({_suffix(name) for name in inside})
    else:
        targets = sorted(target_modules)
        absent = [t for t in targets if not any(f".{name}".endswith(f".{t}") for name in inside)]
        if absent:
            raise ValueError(
                f"no linear module of the layers of {type(base).__name__} is named {absent}; "
                f"there are {sorted({_suffix(name) for name in inside})}"
            )
    fields: dict[str, Any] = {"target_modules": targets, "layers_to_transform": sorted(set(layers))}
    wanted = {
        f"{blocks.path}.{name}"
        for name in inside
        if int(name.split(".")[0]) in fields["layers_to_transform"] and _matches(name, targets)
    }
    parts = blocks.path.split(".")
    patterns = [None, *(".".join(parts[-k:]) for k in range(1, len(parts) + 1))]
    for pattern in patterns:
        candidate = fields if pattern is None else {**fields, "layers_pattern": pattern}
        if _reached(base, candidate) == wanted:
            return candidate
    raise ValueError(
        f"PEFT cannot adapt {targets} in layers {fields['layers_to_transform']} of {type(base).__name__} alone: other "
        f"modules have the same names as {blocks.path}; name the modules in full and leave layers_to_transform out"
    )


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    # quantised layers are not all subclasses of nn.Linear; by convention their class is called so
    leaf = not any(True for _ in module.children())
    wraps = hasattr(module, "base_layer")  # PEFT's own layer around a linear one
    return isinstance(module, nn.Linear | Conv1D) or ((leaf or wraps) and "Linear" in type(module).__name__)


def _linear_names(root: nn.Module) -> list[str]:
    names: list[str] = []
    for name, module in root.named_modules():
        if _is_linear(module) and not any(name.startswith(f"{outer}.") for outer in names):
            names.append(name)
    return names


def _suffix(name: str) -> str:
    """The last part of a name, with more in front while it is only a number."""
    parts = name.split(".")
    start = len(parts) - 1
    while parts[start].isdigit() and start > 0:
        start -= 1
    return ".".join(parts[start:])


def _matches(name: str, targets: Sequence[str]) -> bool:
    return any(f".{name}".endswith(f".{target}") for target in targets)


def _reached(base: nn.Module, fields: dict[str, Any]) -> set[str]:
    """The modules that PEFT itself would adapt with these fields."""
    from peft import LoraConfig

    config = LoraConfig(**fields)
    wrapped = tuple(f"{name}." for name, module in base.named_modules() if hasattr(module, "base_layer"))
    names = [name for name, _ in base.named_modules() if not name.startswith(wrapped)]
    return {name for name in names if targets(config, name)}


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


def layers_by_cka(
    named: tuple[Any, Any], model: nn.Module, dataset: Any, processing_class: Any, seed: int, path: str | None = None
) -> tuple[list[int] | None, list[int] | None]:
    """
    Source and target layers as the user named them, with each "cka" replaced by what layer selection chooses.

    Args:
        named: `echo_source_layers` and `echo_target_layers`.
        model: the model with its adapter.
        dataset, processing_class: training data and tokenizer.
        seed: seed of the samples that are looked at.
        path: of the decoder layers in the model, where they cannot be found (`echo_layers`).
    """
    selection = select_layers(model, dataset, processing_class=processing_class, seed=seed, blocks_path=path)
    adapted = [index for index, layer in enumerate(decoder_layers(model, path)) if lora_sites(layer, index)]
    chosen = echo_layers(selection, adapted=adapted)
    return tuple(by_cka if name == "cka" else name for name, by_cka in zip(named, chosen, strict=True))


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
