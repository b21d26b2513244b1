"""`Adapter`: a saved adapter as one value, read once and handed on from saving to checking, the card and the push.

Config and tensor headers are there at once; what needs the weights themselves (`values`, `non_finite`, `digest`) is
read when it is first asked for, and once. A folder that is written anew is a new value: `read.read_adapter`.

Shapes, as PEFT stores them: ``lora_A`` is (r, in_features), ``lora_B`` is (out_features, r). For an adapted embedding
``lora_embedding_A`` is (r, rows) and ``lora_embedding_B`` is (width, r), so the rank is in the same place. For a bare
parameter of E experts (``target_parameters``) ``lora_A`` is (r E, in_features) and ``lora_B`` (out_features, r E).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ..compat.peft import pattern_key, targets
from ..files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, sha256

CONFIG_NAME, WEIGHTS_NAME = ADAPTER_CONFIG, ADAPTER_WEIGHTS
PREFIX = "base_model.model."

# PEFT loads names with its default adapter's name left in.
_LORA_KEY = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<linear>[AB])(\.default)?\.weight|lora_embedding_(?P<embedding>[AB])(\.default)?)$"
)
_LAYER = re.compile(r"^(?P<stack>.*?)\.(?P<index>\d+)\.")


class AdapterError(ValueError):
    """The adapter folder cannot be read as what the caller asked for; the message says what to do.

    Attributes:
        rule: name of the rule of `rules.UNREADABLE` that the folder breaks, and `what` breaks it; None for others.
    """

    rule: str | None = None
    what: str = ""


@dataclass(frozen=True)
class Tensor:
    """One entry of a safetensors header."""

    shape: tuple[int, ...]
    dtype: str
    file: Path


@dataclass(frozen=True)
class LoraModule:
    """The tensors of one adapted module; ``path`` is its name in the base (``model.layers.0.mlp.up_proj``)."""

    path: str
    keys: dict[str, str]  # "A" and "B" -> tensor name

    @property
    def kind(self) -> str:
        """The last part of the name: ``up_proj``."""
        return self.path.rpartition(".")[2]

    @property
    def stack(self) -> str | None:
        """What holds the numbered layers (``model.layers``), or None outside of them (``lm_head``)."""
        return match["stack"] if (match := _LAYER.match(self.path)) else None

    @property
    def layer(self) -> int | None:
        """The layer index, or None outside of the layers."""
        return int(match["index"]) if (match := _LAYER.match(self.path)) else None


@dataclass
class Adapter:
    """
    An adapter folder: its config, the headers of its weights, and the LoRA modules they form.

    Attributes:
        folder, config, tensors: where it is, and what is in it.
        extra_files: other safetensors files and the names of their tensors.
        modules: LoRA on layers, by the layer's name in the base.
        parameters: LoRA on bare parameters, by PEFT's name for it: ``mlp.experts`` is that of the last parameter of
            the module which is adapted, ``mlp.experts.base_layer`` that of the one before it.
        other_keys: tensors that are neither lora_A nor lora_B.
        run_folder: where card and tokenizer are, if that is above `folder`: PEFT saves an adapter with a name of its
            own in a folder of this name.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    extra_files: dict[str, list[str]] = field(default_factory=dict)
    modules: dict[str, LoraModule] = field(default_factory=dict)
    parameters: dict[str, LoraModule] = field(default_factory=dict)
    other_keys: list[str] = field(default_factory=list)
    run_folder: Path | None = None

    def __post_init__(self) -> None:
        for key in self.tensors:
            match = _LORA_KEY.match(key)
            if match is None:
                self.other_keys.append(key)
                continue
            path = match["module"].removeprefix(PREFIX)
            group = self.parameters if self._is_of_a_parameter(path) else self.modules
            group.setdefault(path, LoraModule(path, {})).keys[match["linear"] or match["embedding"]] = key

    @property
    def copies(self) -> set[str]:
        """Tensors that PEFT saves twice where a vocabulary was resized, and loads once."""
        saved = {key for key in self.tensors if key.replace(".modules_to_save.", ".") in self.tensors.keys() - {key}}
        tokens = {key for key in self.tensors if key.endswith(".trainable_tokens_delta")}  # a tied head shares them
        return saved | (tokens if len(tokens) > 1 else set())

    @property
    def home(self) -> Path:
        """The folder of the run."""
        return self.run_folder or self.folder

    @property
    def weights(self) -> Path:
        """The file of the tensors."""
        return self.folder / WEIGHTS_NAME

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file of the tensors."""
        return sha256(self.weights)

    @cached_property
    def values(self) -> dict[str, torch.Tensor]:
        """The tensors themselves, on the CPU, by name."""
        return load_file(self.weights)

    @cached_property
    def non_finite(self) -> list[str]:
        """Names of the tensors that hold NaN or infinity."""
        if "values" in self.__dict__:
            return [name for name, value in self.values.items() if not _finite(value)]
        return non_finite(self.weights)

    @property
    def n_parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def largest_rank(self) -> int:
        """Of the complete modules, and of what the config gives bare parameters; 0 where there are none."""
        ranks = [self.rank(module) for module in self.complete]
        if self.parameters:
            ranks += [self.config.get("r", 8), *(self.config.get("rank_pattern") or {}).values()]
        return max(ranks, default=0)

    @property
    def complete(self) -> list[LoraModule]:
        """Modules with an A and a B, both matrices."""
        return [m for m in self.modules.values() if len(m.keys) == 2 and all(len(s) == 2 for s in self.shapes(m))]

    def shapes(self, module: LoraModule) -> list[tuple[int, ...]]:
        """The shapes of A and B, in this order, of those that are there."""
        return [self.tensors[module.keys[side]].shape for side in "AB" if side in module.keys]

    def rank(self, module: LoraModule) -> int:
        """The rank that the config gives the module (``r`` or ``rank_pattern``), matched as PEFT matches it."""
        return self._by_pattern("rank_pattern", "r", module)

    def alpha(self, module: LoraModule) -> float:
        """The alpha that the config gives the module (``lora_alpha`` or ``alpha_pattern``)."""
        return self._by_pattern("alpha_pattern", "lora_alpha", module)

    def scale(self, module: LoraModule) -> float:
        """PEFT's factor on B A: alpha / r, or alpha / sqrt(r) for rsLoRA."""
        rank = self.rank(module)
        return self.alpha(module) / (rank**0.5 if self.config.get("use_rslora") else rank)

    def targets(self, path: str) -> bool:
        """Whether PEFT, loading this config, adapts the module at ``path``."""
        names = ("exclude_modules", "modules_to_save", "target_parameters", "layers_to_transform", "layers_pattern")
        config = SimpleNamespace(**{name: self.config.get(name) for name in names})
        config.target_modules = self.config.get("target_modules") or []
        return targets(config, path)

    def _is_of_a_parameter(self, path: str) -> bool:
        """Whether PEFT stores LoRA on a bare parameter here; one without the name of its module is of experts."""
        while path.endswith(".base_layer"):
            path = path.removesuffix(".base_layer")
        holders = {str(name).rpartition(".")[0] or "experts" for name in self.config.get("target_parameters") or []}
        return any(f".{path}".endswith(f".{holder}") for holder in holders)

    def _by_pattern(self, pattern_name: str, default_name: str, module: LoraModule) -> Any:
        pattern = self.config.get(pattern_name) or {}
        # 8 is PEFT's default for both r and lora_alpha
        return pattern.get(pattern_key(pattern.keys(), module.path), self.config.get(default_name, 8))


def non_finite(weights: Path) -> list[str]:
    """Names of the tensors of a safetensors file that hold NaN or infinity, read one at a time."""
    with safe_open(weights, framework="pt") as file:
        return [name for name in file.keys() if not _finite(file.get_tensor(name))]  # noqa: SIM118, not a dict


def _finite(value: torch.Tensor) -> bool:
    return bool(torch.isfinite(value.float()).all())
