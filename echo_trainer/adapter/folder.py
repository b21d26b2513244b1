"""Reading a saved adapter and its base without loading either: tensor headers, and shapes from a model on "meta".

Shapes, as PEFT stores them: ``lora_A`` is (r, in_features), ``lora_B`` is (out_features, r). For an adapted embedding
``lora_embedding_A`` is (r, rows) and ``lora_embedding_B`` is (width, r), so the rank is in the same place.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..files import ADAPTER_CONFIG, ADAPTER_WEIGHTS

CONFIG_NAME, WEIGHTS_NAME = ADAPTER_CONFIG, ADAPTER_WEIGHTS
PREFIX = "base_model.model."

_LORA_KEY = re.compile(r"(?P<module>.+)\.(?:lora_(?P<linear>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))$")
_TYPES = {
    "rank_pattern": (dict,),
    "alpha_pattern": (dict,),
    "target_modules": (list, str),
    "exclude_modules": (list, str),
    "modules_to_save": (list,),
    "layers_to_transform": (list, int),
    "layers_pattern": (list, str),
}
_LAYER = re.compile(r"^(?P<stack>.*?)\.(?P<index>\d+)\.")


class AdapterError(ValueError):
    """The adapter folder cannot be read as what the caller asked for; the message says what to do."""


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
    """An adapter folder: its config, the headers of its weights, and the LoRA modules they form."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    extra_files: dict[str, list[str]] = field(default_factory=dict)  # other *.safetensors -> their tensor names
    modules: dict[str, LoraModule] = field(default_factory=dict)
    other_keys: list[str] = field(default_factory=list)  # tensors that are not lora_A or lora_B

    def __post_init__(self) -> None:
        for key in self.tensors:
            match = _LORA_KEY.match(key)
            if match is None:
                self.other_keys.append(key)
                continue
            path = match["module"].removeprefix(PREFIX)
            self.modules.setdefault(path, LoraModule(path, {})).keys[match["linear"] or match["embedding"]] = key

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
        from ..compat.peft import targets

        names = ("exclude_modules", "modules_to_save", "target_parameters", "layers_to_transform", "layers_pattern")
        config = SimpleNamespace(**{name: self.config.get(name) for name in names})
        config.target_modules = self.config.get("target_modules") or []
        return targets(config, path)

    def _by_pattern(self, pattern_name: str, default_name: str, module: LoraModule) -> Any:
        from ..compat.peft import pattern_key

        pattern = self.config.get(pattern_name) or {}
        # 8 is PEFT's default for both r and lora_alpha
        return pattern.get(pattern_key(pattern.keys(), module.path), self.config.get(default_name, 8))


def adapter_folder(folder: str | Path) -> Path:
    """
    Where the adapter's files lie: the folder itself, or its one sub-folder that PEFT named after the adapter.

    Raises:
        AdapterError: there is no adapter, or there are several.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterError(f"'{folder}' is not a folder. Give the folder of a finished run.")
    if (folder / CONFIG_NAME).is_file() or (folder / WEIGHTS_NAME).is_file():
        return folder
    named = [path.parent for path in sorted(folder.glob(f"*/{CONFIG_NAME}"))]
    found = [path for path in named if not path.name.startswith("checkpoint-")]
    if len(found) == 1:
        return found[0]
    if found:
        raise AdapterError(f"'{folder}' holds several adapters: {', '.join(p.name for p in found)}. Push one of these "
                           f"folders.")  # fmt: skip
    hint = f" It holds checkpoints; push one of them, such as '{named[-1]}'." if named else ""
    if (folder / "config.json").is_file():
        hint = " It holds a whole model: add --model to push that."
    raise AdapterError(f"'{folder}' holds no adapter: there is no {CONFIG_NAME} and no {WEIGHTS_NAME} in it.{hint}")


def read_adapter(folder: str | Path) -> Adapter:
    """Read a PEFT adapter folder: the config and the tensor headers, no values.

    Raises:
        AdapterError: no folder, no readable config, no safetensors weights, or weights that are cut short. The
            attribute ``rule`` names the rule of `echo_trainer.serving.rules` that this breaks.

    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterError(f"'{folder}' is not a folder. Give the folder that holds {CONFIG_NAME}; an adapter on the "
                           f"Hub is fetched first with `hf download NAME --local-dir DIR`.")  # fmt: skip
    config = _read_config(folder)
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(f"adapter{pattern}"))
        if pickles:
            raise _broken("pickle", f"the weights are in {', '.join(pickles)}")
        raise _broken("no-weights", f"there is no {WEIGHTS_NAME} in '{folder}'")
    extra = {p.name: list(_headers(p)) for p in sorted(folder.glob("*.safetensors")) if p.name != WEIGHTS_NAME}
    return Adapter(folder, config, _headers(weights), extra)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise _broken("no-config", f"there is no {CONFIG_NAME} in '{folder}'")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _broken("broken-config", f"{CONFIG_NAME} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise _broken("broken-config", f"{CONFIG_NAME} holds a {type(config).__name__}, not an object")
    for name, types in _TYPES.items():
        if not isinstance(config.get(name), (*types, type(None))):
            raise _broken("bad-setting", f"{name}={config[name]!r} is no {' or '.join(t.__name__ for t in types)}")
    patterns = [value for name in _TYPES if (value := config.get(name)) and not isinstance(value, int)]
    for pattern in (each for value in patterns for each in ([value] if isinstance(value, str) else value)):
        try:
            re.compile(str(pattern))
        except re.error as error:
            raise _broken("bad-setting", f"{pattern!r} is no regular expression: {error}") from error
    return config


def _headers(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {key: Tensor(tuple(part.get_shape()), part.get_dtype(), path) for key, part in slices.items()}
    except (SafetensorError, OSError) as error:
        if _is_lfs_pointer(path):
            raise _broken("lfs-pointer", f"{path.name} is a git-lfs pointer of {path.stat().st_size} bytes, not the "
                                         f"weights; `git lfs pull` in the clone fetches them") from error  # fmt: skip
        raise _broken("broken-weights", f"{path.name} cannot be read: {error}") from error


def _is_lfs_pointer(path: Path) -> bool:
    """Whether git put its stand-in for a large file here, because git-lfs was not installed or skipped it."""
    try:
        with path.open("rb") as file:
            return file.read(64).startswith(b"version https://git-lfs.github.com/spec/")
    except OSError:
        return False


def _broken(rule: str, what: str) -> AdapterError:
    first = what.partition(" ")[0]
    error = AdapterError(f"{what if '.' in first else what[0].upper() + what[1:]}.")  # file names stay as they are
    error.rule, error.what = rule, what
    return error


@dataclass(frozen=True)
class Base:
    """What the rules need of the base model: (out, in) of every linear layer and embedding, by name."""

    name: str
    model_type: str
    shapes: dict[str, tuple[int, int]]
    tied: bool

    def layers(self, stack: str, kind: str) -> dict[str, tuple[int, int]]:
        """The modules named ``kind`` in the numbered layers of ``stack``, in order."""
        inside = re.compile(rf"{re.escape(stack)}\.\d+\.(.*\.)?{re.escape(kind)}$")
        return {path: shape for path, shape in self.shapes.items() if inside.match(path)}


def read_base(base: Any, download: bool = False) -> Base:
    """The shapes of a base model, without its weights.

    Args:
        base: a model (also a PeftModel), its config, a folder with ``config.json``, or a name on the Hub.
        download: whether ``config.json`` may be fetched from the Hub when it is not in the local cache.

    Raises:
        AdapterError: the config is not found, or this transformers does not know the architecture.

    """
    import torch
    import transformers

    from ..compat.building import empty_model
    from ..compat.identity import name_of

    if isinstance(base, torch.nn.Module):
        model = base.get_base_model() if hasattr(base, "get_base_model") else base
        return _shapes_of(model, name_of(model.config) or type(model).__name__)
    name = name_of(base) or type(base).__name__
    if isinstance(base, str | Path):
        name = str(base)
        try:
            base = transformers.AutoConfig.from_pretrained(name, local_files_only=not download)
        except (OSError, ValueError, KeyError) as error:
            raise AdapterError(
                f"The config of the base model '{name}' cannot be read ({str(error).splitlines()[0]}). Give a folder "
                f"with a config.json, or a name on the Hub that is reachable or already in the local cache."
            ) from error
    try:
        model = empty_model(base)
    except ValueError as error:
        raise AdapterError(f"'{name}' is no causal language model that this transformers knows: {error}") from error
    return _shapes_of(model, name)


def _shapes_of(model: Any, name: str) -> Base:
    shapes = {}
    for path, module in model.named_modules():
        if "lora_" in path or path.endswith(".base_layer"):
            continue
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            shapes[path] = (module.out_features, module.in_features)
        elif hasattr(module, "nf") and hasattr(module, "nx"):  # transformers' Conv1D
            shapes[path] = (module.nf, module.nx)
        elif hasattr(module, "num_embeddings"):
            shapes[path] = (module.embedding_dim, module.num_embeddings)
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    return Base(name, getattr(model.config, "model_type", ""), shapes, tied)
