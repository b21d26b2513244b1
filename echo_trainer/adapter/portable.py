"""Rewriting a LoRA adapter, without loss, into the one form that every serving engine reads correctly.

For module m with rank r_m and alpha_m, PEFT adds  s_m B_m A_m  to the weight, where
s_m = alpha_m / r_m, or alpha_m / sqrt(r_m) for rsLoRA. The portable form is

    R   one rank, a multiple of 16, at least max r_m;   B_m padded with zeros to it, A_m with new rows
    s   one scale, the most common s_m;                 alpha = s R,  B_m multiplied by s_m / s
    0   B = 0 and a new A for modules that were not trained but whose name is a target in another layer

so that  (alpha / R) B'_m A'_m = s_m B_m A_m. Engines that ignore patterns, rsLoRA, or adapters with holes then have
nothing left to ignore. What is new is as PEFT begins a LoRA, one side random and the other zero: it changes nothing,
and it learns when somebody trains on. Both sides zero would never get a gradient.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .base import Base, read_base
from .folder import PREFIX, Adapter, AdapterError
from .portable_refuse import NotPortableError, refuse_foreign_tensors, refuse_what_is_not_lora
from .read import read_adapter
from .write import write_adapter

__all__ = ["NotPortableError", "make_portable"]

RANK_BLOCK = 16
SEED = 0
"""Of what is new, so that the same adapter gives the same file."""

_ATTENTION = ("q_proj", "k_proj", "v_proj")


def make_portable(
    adapter: str | Path | Adapter,
    base_config_or_model: Any = None,
    out_dir: str | Path | None = None,
    rank: int | None = None,
) -> Path:
    """Rewrite a PEFT LoRA adapter into the portable form; logits stay equal up to float32 rounding.

    Args:
        adapter: folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or what was read of it.
        base_config_or_model: the base (model, config, folder, or Hub name); None takes the name in the adapter's
            config. Only shapes are used; weights are never downloaded.
        out_dir: where to write; None rewrites the adapter's own folder. A failure leaves the old adapter in place.
        rank: the rank R to pad to; None takes the smallest multiple of 16 that holds the trained ranks.

    Returns:
        The folder written.

    Raises:
        NotPortableError: DoRA, saved modules, trained biases or tokens, inits that change the base, LoRA variants.
        AdapterError: the folder, a tensor or the base cannot be read, or tensors and config disagree.

    """
    adapter = adapter if isinstance(adapter, Adapter) else read_adapter(adapter)
    refuse_what_is_not_lora(adapter)
    base = read_base(_base_of(adapter, base_config_or_model), download=True)
    refuse_foreign_tensors(adapter, base)
    new_rank = _common_rank(adapter, rank)
    scale = _common_scale(adapter)
    paths = _all_paths(adapter, base)
    tensors = _tensors(adapter, base, paths, new_rank, scale)
    config = _config(adapter, base, paths, new_rank, scale)
    if out_dir is None:
        return write_adapter(adapter.folder, adapter.folder, config, tensors)
    return write_adapter(adapter.home, Path(out_dir), config, tensors)


def _base_of(adapter: Adapter, base: Any) -> Any:
    base = base if base is not None else adapter.config.get("base_model_name_or_path")
    if not base:
        raise AdapterError(f"'{adapter.folder}' does not name its base model, whose layer shapes are needed. Pass the "
                           f"base: a model, a config, a folder, or a name on the Hub.")  # fmt: skip
    return base


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


def _tensors(adapter: Adapter, base: Base, paths: list[str], rank: int, scale: float) -> dict[str, Tensor]:
    tensors, generator = {}, torch.Generator().manual_seed(SEED)
    factors = {path: adapter.scale(module) / scale for path, module in adapter.modules.items()}
    values = adapter.values
    if adapter.non_finite:
        raise AdapterError(f"The tensor '{adapter.non_finite[0]}' holds NaN or infinity: training diverged or the "
                           f"file is damaged. Take an earlier checkpoint.")  # fmt: skip
    dtypes = {values[key].dtype for module in adapter.modules.values() for key in module.keys.values()}
    dtype = max(dtypes, key=lambda dtype: dtype.itemsize)
    rounds = any(not _is_power_of_two(factor) for factor in factors.values())  # a half-precision B
    if rounds or not dtypes <= {torch.float16, torch.bfloat16, torch.float32} or len(dtypes) > 1:
        dtype = torch.float32
    for path in paths:
        module = adapter.modules.get(path)
        embedding = module is not None and "lora_embedding" in module.keys["A"]
        trained = adapter.rank(module) if module is not None else 0
        a, b = (part.to(dtype) for part in _new_ranks(base.shapes[path], rank - trained, embedding, generator))
        if module is not None:
            scaled = (values[module.keys["B"]].double() * factors[path]).to(dtype)
            a, b = torch.cat([values[module.keys["A"]].to(dtype), a]), torch.cat([scaled, b], dim=1)
        tensors[f"{PREFIX}{path}.{'lora_embedding_A' if embedding else 'lora_A.weight'}"] = a
        tensors[f"{PREFIX}{path}.{'lora_embedding_B' if embedding else 'lora_B.weight'}"] = b
    return tensors


def _new_ranks(
    shape: tuple[int, int], count: int, embedding: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Rows (count, in) of A and columns (out, count) of B that add nothing, as PEFT initialises them; float32."""
    out_features, in_features = shape
    a = torch.zeros(count, in_features, dtype=torch.float32)
    b = torch.zeros(out_features, count, dtype=torch.float32)
    if count and embedding:
        nn.init.normal_(b, generator=generator)
    elif count:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
    return a, b


def _is_power_of_two(factor: float) -> bool:
    return factor == 0 or abs(math.frexp(factor)[0]) == 0.5


def _config(adapter: Adapter, base: Base, paths: list[str], rank: int, scale: float) -> dict[str, Any]:
    kinds = {path.rpartition(".")[2] for path in paths}
    named = {path for path in base.shapes if path.rpartition(".")[2] in kinds}
    short = named == set(paths) and not any(kind.isdigit() for kind in kinds)  # a number names layers as well
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
        "target_modules": sorted(kinds) if short else paths,
        "bias": "none",
        "fan_in_fan_out": bool(adapter.config.get("fan_in_fan_out")),
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
    }
    # PEFT up to 0.12 stops at keys that it does not know, and null means the default in all versions
    return {name: value for name, value in config.items() if value is not None}
