"""`LoraConfig` fields that adapt chosen layers and nothing else."""

from collections.abc import Sequence
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..compat.peft import targets
from ..passes.modules import base_model_of
from .representations import find_blocks


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
    config = LoraConfig(**fields)
    wrapped = tuple(f"{name}." for name, module in base.named_modules() if hasattr(module, "base_layer"))
    names = [name for name, _ in base.named_modules() if not name.startswith(wrapped)]
    return {name for name in names if targets(config, name)}
