"""Rewriting a LoRA adapter, without loss, into the one form that every serving engine reads correctly.

For module m with rank r_m and alpha_m, PEFT adds  s_m B_m A_m  to the weight, where
s_m = alpha_m / r_m, or alpha_m / sqrt(r_m) for rsLoRA. The portable form is

    R   one rank, a multiple of 16, at least max r_m;   A_m, B_m padded with zeros to it
    s   one scale, the most common s_m;                 alpha = s R,  B_m multiplied by s_m / s
    0   zero tensors for modules that were not trained but whose name is a target in another layer

so that  (alpha / R) B'_m A'_m = s_m B_m A_m. Engines that ignore patterns, rsLoRA, or adapters with holes then have
nothing left to ignore. Zero tensors get no gradient: continue training from a checkpoint, not from this form.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .serving_adapter import CONFIG_NAME, PREFIX, WEIGHTS_NAME, Adapter, AdapterError, Base, read_adapter, read_base

if TYPE_CHECKING:
    import torch

RANK_BLOCK = 16
HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")  # they leave the base weights as they were
BESIDES = ("README.md", "assets", "tokenizer*", "special_tokens_map.json", "chat_template.jinja", "vocab.json",
           "merges.txt", "added_tokens.json", "echo_run.json", ".eval_results")  # fmt: skip

_ATTENTION = ("q_proj", "k_proj", "v_proj")
# Settings that the rewriting takes care of, or that matter in training only.
_HANDLED = {"alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config",
            "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
            "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config",
            "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
            "target_modules", "task_type", "trainable_token_indices", "use_dora", "use_rslora",
            "velora_config"}  # fmt: skip


class NotPortableError(AdapterError):
    """The adapter is more than s B A on the base's linear layers, so no plain LoRA is equal to it."""


def make_portable(
    adapter_dir: str | Path,
    base_config_or_model: Any = None,
    out_dir: str | Path | None = None,
    rank: int | None = None,
) -> Path:
    """Rewrite a PEFT LoRA adapter into the portable form; logits stay equal up to float32 rounding.

    Args:
        adapter_dir: folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        base_config_or_model: the base (model, config, folder, or Hub name); None takes the name in the adapter's
            config. Only shapes are used; weights are never downloaded.
        out_dir: where to write; None rewrites ``adapter_dir`` itself. A failure leaves the old adapter in place.
        rank: the rank R to pad to; None takes the smallest multiple of 16 that holds the trained ranks.

    Returns:
        The folder written.

    Raises:
        NotPortableError: DoRA, saved modules, trained biases or tokens, inits that change the base, LoRA variants.
        AdapterError: the folder, a tensor or the base cannot be read, or tensors and config disagree.

    """
    adapter = read_adapter(adapter_dir)
    _refuse_what_is_not_lora(adapter)
    base = read_base(_base_of(adapter, base_config_or_model), download=True)
    _refuse_foreign_tensors(adapter, base)
    new_rank = _common_rank(adapter, rank)
    scale = _common_scale(adapter)
    paths = _all_paths(adapter, base)
    tensors = _tensors(adapter, base, paths, new_rank, scale)
    config = _config(adapter, base, paths, new_rank, scale)
    return _write(adapter.folder, Path(out_dir) if out_dir else adapter.folder, config, tensors)


def changes_base(config: dict[str, Any]) -> str | None:
    """The name of an initialisation that changed the base weights (PiSSA, OLoRA, CorDA, LoftQ ...), or None."""
    init = config.get("init_lora_weights", True)
    return init if isinstance(init, str) and init.lower() not in HARMLESS_INITS else None


def _base_of(adapter: Adapter, base: Any) -> Any:
    base = base if base is not None else adapter.config.get("base_model_name_or_path")
    if not base:
        raise AdapterError(f"'{adapter.folder}' does not name its base model, whose layer shapes are needed. Pass the "
                           f"base: a model, a config, a folder, or a name on the Hub.")  # fmt: skip
    return base


def _refuse_what_is_not_lora(adapter: Adapter) -> None:
    from peft import LoraConfig

    config = adapter.config
    merged = "`echo-trainer export --merged` writes base and adapter as one model"
    if config.get("peft_type") != "LORA":
        raise NotPortableError(f"The adapter is of type {config.get('peft_type')}, not LORA. {merged}.")
    if config.get("use_dora") or any("lora_magnitude" in key for key in adapter.other_keys):
        raise NotPortableError(
            f"The adapter is DoRA: it rescales each row of the whole weight, which no B A can express. {merged}, "
            f"exact up to rounding; `echo-trainer export --lora` fits a LoRA to it and reports the error."
        )
    if init := changes_base(config):
        raise NotPortableError(
            f"init_lora_weights={init!r} changed the base weights in training, so the tensors fit no base that an "
            f"engine has. {merged}; or save with `path_initial_model_for_weight_conversion` (see PEFT's docs)."
        )
    for name in ("modules_to_save", "trainable_token_indices"):
        if config.get(name):
            raise NotPortableError(f"{name}={config[name]} trained weights of the base itself, outside of LoRA. "
                                   f"{merged}.")  # fmt: skip
    # JSON turns sets and tuples into lists; compare with the defaults in the same form
    defaults = json.loads(json.dumps(LoraConfig().to_dict(), default=list))
    for name, default in defaults.items():
        if name not in _HANDLED and name in config and config[name] not in (default, None, False, [], {}):
            raise NotPortableError(f"{name}={config[name]} makes this a variant of LoRA that is not known to equal a "
                                   f"plain one. {merged}.")  # fmt: skip


def _refuse_foreign_tensors(adapter: Adapter, base: Base) -> None:
    for key in adapter.other_keys:
        path = key.removeprefix(PREFIX).removesuffix(".base_layer.weight")
        copied = key.endswith(".base_layer.weight") and base.shapes.get(path) is not None
        # PEFT stores a copy of an adapted embedding. It is the base's own unless the vocabulary was resized.
        if copied and sorted(adapter.tensors[key].shape) == sorted(base.shapes[path]):
            continue
        raise NotPortableError(
            f"The tensor '{key}' is no lora_A or lora_B (a trained bias, a saved module, a resized embedding, or "
            f"foreign), so a plain LoRA would lose it. `echo-trainer export --merged` keeps it; or remove the tensor "
            f"if it should not be there."
        )
    if adapter.extra_files:
        raise AdapterError(f"'{adapter.folder}' holds other safetensors files: {', '.join(adapter.extra_files)}. Some "
                           f"engines read them all; move them out of the folder first.")  # fmt: skip
    if not adapter.modules:
        raise AdapterError(f"'{adapter.folder}' holds no LoRA tensor. Save the adapter again.")
    for module in adapter.modules.values():
        shapes, rank = adapter.shapes(module), adapter.rank(module)
        expected = base.shapes.get(module.path)
        if expected is None:
            raise AdapterError(f"The module '{module.path}' of the adapter is not in the base {base.name}. Give the "
                               f"base that the adapter was trained on.")  # fmt: skip
        if [tuple(s) for s in shapes] != [(rank, expected[1]), (expected[0], rank)]:
            raise AdapterError(
                f"The tensors of '{module.path}' have shapes {', '.join(map(str, shapes))}; rank {rank} and the base "
                f"{base.name} ask for A {(rank, expected[1])} and B {(expected[0], rank)}. Correct r in "
                f"{CONFIG_NAME}, give the base it was trained on, or save the adapter again."
            )
        if not adapter.targets(module.path):
            raise AdapterError(f"The adapter has tensors for '{module.path}', which its target_modules leave out, so "
                               f"PEFT does not load them. Correct target_modules in {CONFIG_NAME}.")  # fmt: skip


def _common_rank(adapter: Adapter, rank: int | None) -> int:
    trained = max(adapter.rank(module) for module in adapter.modules.values())
    if rank is None:
        return -(-trained // RANK_BLOCK) * RANK_BLOCK
    if rank < trained or rank % RANK_BLOCK:
        raise AdapterError(f"rank={rank} cannot hold the adapter: it must be a multiple of {RANK_BLOCK} and at least "
                           f"{trained}. Leave it out to take the smallest.")  # fmt: skip
    return rank


def _common_scale(adapter: Adapter) -> float:
    scales = Counter(scale for module in adapter.modules.values() if (scale := adapter.scale(module)))
    return scales.most_common(1)[0][0] if scales else 1.0


def _all_paths(adapter: Adapter, base: Base) -> list[str]:
    """Every module that the portable form holds: each kind that occurs in a stack of layers, in all its layers."""
    paths = set(adapter.modules)
    for stack, kind in {(m.stack, m.kind) for m in adapter.modules.values() if m.stack is not None}:
        for each in _ATTENTION if kind in _ATTENTION else (kind,):
            paths.update(base.layers(stack, each))
    return [path for path in base.shapes if path in paths]


def _tensors(adapter: Adapter, base: Base, paths: list[str], rank: int, scale: float) -> dict[str, torch.Tensor]:
    import torch
    from safetensors import safe_open

    tensors = {}
    factors = {path: adapter.scale(module) / scale for path, module in adapter.modules.items()}
    with safe_open(adapter.folder / WEIGHTS_NAME, framework="pt") as file:
        values = {key: file.get_tensor(key) for module in adapter.modules.values() for key in module.keys.values()}
    for key, value in values.items():
        if not torch.isfinite(value.float()).all():
            raise AdapterError(f"The tensor '{key}' holds NaN or infinity: training diverged or the file is damaged. "
                               f"Take an earlier checkpoint.")  # fmt: skip
    dtype = next(iter(values.values())).dtype
    if any(not _is_power_of_two(factor) for factor in factors.values()):
        dtype = torch.float32  # a half-precision B would be rounded by the factor
    for path in paths:
        out_features, in_features = base.shapes[path]
        a = torch.zeros(rank, in_features, dtype=dtype)
        b = torch.zeros(out_features, rank, dtype=dtype)
        module = adapter.modules.get(path)
        if module is not None:
            trained_rank = adapter.rank(module)
            a[:trained_rank] = values[module.keys["A"]]
            b[:, :trained_rank] = (values[module.keys["B"]].double() * factors[path]).to(dtype)
        embedding = module is not None and "lora_embedding" in module.keys["A"]
        tensors[f"{PREFIX}{path}.{'lora_embedding_A' if embedding else 'lora_A.weight'}"] = a
        tensors[f"{PREFIX}{path}.{'lora_embedding_B' if embedding else 'lora_B.weight'}"] = b
    return tensors


def _is_power_of_two(factor: float) -> bool:
    import math

    return factor == 0 or abs(math.frexp(factor)[0]) == 0.5


def _config(adapter: Adapter, base: Base, paths: list[str], rank: int, scale: float) -> dict[str, Any]:
    kinds = {path.rpartition(".")[2] for path in paths}
    named = {path for path in base.shapes if path.rpartition(".")[2] in kinds}
    alpha = scale * rank
    config = {
        "peft_type": "LORA",
        "task_type": adapter.config.get("task_type"),
        "auto_mapping": adapter.config.get("auto_mapping"),
        "base_model_name_or_path": adapter.config.get("base_model_name_or_path"),
        "revision": adapter.config.get("revision"),
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": adapter.config.get("lora_dropout"),
        # short names when they select exactly these modules; a vision tower may share them with the language model
        "target_modules": sorted(kinds) if named == set(paths) else paths,
        "bias": "none",
        "fan_in_fan_out": bool(adapter.config.get("fan_in_fan_out")),
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
    }
    # PEFT up to 0.12 stops at keys that it does not know, and null means the default in all versions
    return {name: value for name, value in config.items() if value is not None}


def _write(source: Path, out: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    from safetensors.torch import save_file

    out.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=".portable-", dir=out if out.is_dir() else out.parent))
    try:
        new = stage / "new"
        new.mkdir()
        save_file(tensors, new / WEIGHTS_NAME, metadata={"format": "pt"})
        (new / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if not out.is_dir():
            copy_besides(source, new)
            new.rename(out)
        else:
            if out.resolve() != source.resolve():
                copy_besides(source, out)
            _swap(new, out, stage / "old")
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return out


def copy_besides(source: Path, out: Path) -> None:
    """Copy what belongs beside an adapter or a model: the card and the tokenizer, no checkpoints, no weights."""
    for path in (path for pattern in BESIDES for path in source.glob(pattern)):
        if path.is_dir():
            shutil.copytree(path, out / path.name, dirs_exist_ok=True)
        else:
            shutil.copy2(path, out / path.name)


def _swap(new: Path, out: Path, old: Path) -> None:
    """Put the two files of ``new`` in the place of those in ``out``, or put the old ones back.

    The config goes first and comes back last: whoever looks in between finds no adapter, never a mixed one.
    """
    old.mkdir()
    present = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if (out / name).exists()]
    try:
        for name in present:
            os.replace(out / name, old / name)
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            os.replace(new / name, out / name)
    except BaseException:
        for name in reversed(present):
            if (old / name).exists():
                os.replace(old / name, out / name)
        raise
