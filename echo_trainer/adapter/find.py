"""What a rule looks for: each function returns the settings or tensors that break it, an empty list when none do.

Every function takes the adapter and its base; the base is None when it is not known, and then only what the adapter
itself shows is found. What each is for is said in `adapter.rules`.
"""

# ruff: noqa: D103

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

from ..compat.peft import is_method, mergeable
from .base import Base
from .folder import PREFIX, Adapter, LoraModule
from .vocabulary import missing_rows

Found = list[str]
TGI_KINDS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
EMBEDDINGS = {"lm_head", "embed_tokens", "embed_in", "embed_out", "wte", "wpe"}
NO_LORA_IN_VLLM = {"gpt2", "gptj", "bloom", "falcon", "stablelm"}


def by_kind(adapter: Adapter) -> dict[tuple[str | None, str], list[LoraModule]]:
    kinds = defaultdict(list)
    for module in adapter.complete:
        kinds[module.stack, module.kind].append(module)
    return kinds


def settings(adapter: Adapter, names: Iterable[str]) -> Found:
    return [f"{name}={adapter.config[name]}" for name in names if adapter.config.get(name)]


def not_lora(adapter: Adapter, base: Base | None) -> Found:
    kind = adapter.config.get("peft_type")
    return [f"peft_type={kind!r}"] if _is_another(adapter) and mergeable(kind) else []


def not_mergeable(adapter: Adapter, base: Base | None) -> Found:
    kind = adapter.config.get("peft_type")
    return [f"peft_type={kind!r}"] if _is_another(adapter) and not mergeable(kind) else []


def mislabelled(adapter: Adapter, base: Base | None) -> Found:
    kind = adapter.config.get("peft_type")
    return [f"peft_type={kind!r}"] if kind != "LORA" and not _is_another(adapter) else []


def missing_settings(adapter: Adapter, base: Base | None) -> Found:
    config = adapter.config
    missing = [name for name in ("r", "target_modules") if config.get(name) is None]
    return [name for name in missing if name == "r" or not config.get("target_parameters")]


def alpha_missing(adapter: Adapter, base: Base | None) -> Found:
    is_lora = adapter.config.get("peft_type") == "LORA"
    return ["lora_alpha"] if is_lora and adapter.config.get("lora_alpha") is None else []


def bad_numbers(adapter: Adapter, base: Base | None) -> Found:
    config = adapter.config
    ranks = {
        "r": config.get("r", 8),
        **{f"rank_pattern.{k}": v for k, v in (config.get("rank_pattern") or {}).items()},
    }
    alphas = {"lora_alpha": 8 if config.get("lora_alpha") is None else config["lora_alpha"]}
    alphas |= {f"alpha_pattern.{k}": v for k, v in (config.get("alpha_pattern") or {}).items()}
    wrong = {k: v for k, v in ranks.items() if not isinstance(v, int) or isinstance(v, bool) or v < 1}
    wrong |= {k: v for k, v in alphas.items() if not isinstance(v, int | float) or not math.isfinite(v)}
    return [f"{name}={value!r}" for name, value in wrong.items()]


def no_lora_tensors(adapter: Adapter, base: Base | None) -> Found:
    if adapter.modules or adapter.parameters or (loads_all(base) and adapter.tensors):
        return []
    return [f"{len(adapter.tensors)} tensors, no lora_A or lora_B"]


def same_tensors_in_other_files(adapter: Adapter, base: Base | None) -> Found:
    return [name for name, keys in adapter.extra_files.items() if adapter.tensors.keys() & set(keys)]


def other_files(adapter: Adapter, base: Base | None) -> Found:
    return [name for name, keys in adapter.extra_files.items() if not adapter.tensors.keys() & set(keys)]


def dora_flag(adapter: Adapter, base: Base | None) -> Found:
    # without its magnitudes it cannot be merged either, which is what the fix for DoRA would be
    return [] if magnitudes_missing(adapter, base) else settings(adapter, ["use_dora"])


def magnitudes_without_flag(adapter: Adapter, base: Base | None) -> Found:
    return [] if adapter.config.get("use_dora") else [k for k in adapter.other_keys if "lora_magnitude" in k]


def magnitudes_missing(adapter: Adapter, base: Base | None) -> Found:
    if not adapter.config.get("use_dora"):
        return []
    there = {key.partition(".lora_magnitude")[0].removeprefix(PREFIX) for key in adapter.other_keys}
    return [f"{path} has no lora_magnitude_vector" for path in adapter.modules if path not in there]


def saved_modules(adapter: Adapter, base: Base | None) -> Found:
    return settings(adapter, ["modules_to_save"])


def trainable_tokens(adapter: Adapter, base: Base | None) -> Found:
    return settings(adapter, ["trainable_token_indices"])


def base_weights(adapter: Adapter, base: Base | None) -> Found:
    """Weights of the base itself that PEFT loads over the base's own: a resized embedding, or what was added."""
    saved = [k for k in adapter.other_keys if k.endswith(".weight") and "lora_" not in k]
    saved = [k for k in saved if not in_saved_module(adapter, k)]
    if base is None:
        return [k for k in saved if k.split(".")[-2] in EMBEDDINGS]
    copies = {k for k in saved if k.endswith(".base_layer.weight") and _same_rows(adapter, base, k)}
    return [k for k in saved if k not in copies and takes(base, k, otherwise=False)]


def new_tokens(adapter: Adapter, base: Base | None) -> Found:
    lost = 0 if base is None else missing_rows(adapter, base.rows, base.embeddings, base.tied)
    return [f"{lost} tokens above the base's {base.rows} rows"] if base is not None and lost else []


def bias_flag(adapter: Adapter, base: Base | None) -> Found:
    bias = adapter.config.get("bias", "none")
    return settings(adapter, ["lora_bias"]) + ([] if bias == "none" else [f"bias={bias!r}"])


def bias_tensors(adapter: Adapter, base: Base | None) -> Found:
    """Biases that PEFT loads, and that can be merged as far as is known."""
    announced = bool(bias_flag(adapter, base))
    found = [key for key in adapter.other_keys if key.endswith(".bias") and not in_saved_module(adapter, key)]
    nowhere = set(biases_without_a_place(adapter, base))
    return [key for key in found if takes(base, key, otherwise=announced) and key not in nowhere]


def biases_without_a_place(adapter: Adapter, base: Base | None) -> Found:
    """Biases of lora_B on layers of the base that have none."""
    keys = {key: key.removeprefix(PREFIX).partition(".lora_B")[0] for key in adapter.other_keys if ".lora_B" in key}
    return [k for k, path in keys.items() if k.endswith(".bias") and base is not None and path in base.unbiased]


def rslora(adapter: Adapter, base: Base | None) -> Found:
    return [f"use_rslora=True, r={adapter.config.get('r')}"] if settings(adapter, ["use_rslora"]) else []


def mixed_ranks_in_a_kind(adapter: Adapter, base: Base | None) -> Found:
    kinds = {kind: {adapter.rank(m) for m in modules} for (_, kind), modules in by_kind(adapter).items()}
    return [f"{kind} has ranks {sorted(ranks)}" for kind, ranks in kinds.items() if len(ranks) > 1]


def ranks_by_kind(adapter: Adapter, base: Base | None) -> Found:
    default, found = adapter.config.get("r", 8), {}
    for (_, kind), modules in by_kind(adapter).items():
        ranks = {adapter.rank(m) for m in modules}
        if len(ranks) == 1 and ranks != {default}:
            found[kind] = ranks.pop()
    return [f"{kind} has rank {rank}, r={default}" for kind, rank in found.items()]


def several_alphas(adapter: Adapter, base: Base | None) -> Found:
    default = adapter.config.get("lora_alpha", 8)
    alphas = {m.path: alpha for m in adapter.complete if (alpha := adapter.alpha(m)) != default}
    return [f"{path} has alpha {alpha}, lora_alpha={default}" for path, alpha in alphas.items()]


def rank_not_in_blocks(adapter: Adapter, base: Base | None) -> Found:
    ranks = {adapter.rank(m) for m in adapter.complete}
    return [f"rank {rank}" for rank in sorted(ranks) if rank % 16]


def rank_above_512(adapter: Adapter, base: Base | None) -> Found:
    return [f"rank {rank}" for rank in sorted({adapter.rank(m) for m in adapter.complete}) if rank > 512]


def untrained_layers(adapter: Adapter, base: Base | None) -> Found:
    found = []
    deepest = {
        m.stack: max(o.layer for o in adapter.complete if o.stack == m.stack and o.layer is not None)
        for m in adapter.complete
        if m.stack
    }
    for (stack, kind), modules in by_kind(adapter).items():
        if stack is None:
            continue
        if base is None:
            missing = sorted(set(range(deepest[stack] + 1)) - {m.layer for m in modules})
            found += [f"{stack}.{layer} has no {kind}" for layer in missing]
        else:
            found += [f"no tensors for {p}" for p in base.layers(stack, kind) if p not in adapter.modules]
    return found


def depth_unknown(adapter: Adapter, base: Base | None) -> Found:
    layers = [m.layer for m in adapter.complete if m.layer is not None]
    unproven = base is None and layers and not untrained_layers(adapter, None)
    return [f"layers 0 to {max(layers)} are there; the base may have more"] if unproven else []


def regex_targets(adapter: Adapter, base: Base | None) -> Found:
    targets = adapter.config.get("target_modules")
    pattern = isinstance(targets, str) and targets not in ("all-linear", "all")  # SGLang knows these two
    return [f"target_modules={targets!r}"] if pattern else []


def query_and_value_apart(adapter: Adapter, base: Base | None) -> Found:
    found = []
    blocks = defaultdict(set)
    for module in adapter.modules.values():
        blocks[module.path.rpartition(".")[0]].add(module.kind)
    for block, kinds in blocks.items():
        missing = {"q_proj", "v_proj"} - kinds
        if kinds & {"q_proj", "k_proj", "v_proj"} and missing:
            found.append(f"{block} has {', '.join(sorted(kinds))} and no {', '.join(sorted(missing))}")
    return found


def embeddings(adapter: Adapter, base: Base | None) -> Found:
    return [m.path for m in adapter.modules.values() if m.kind in EMBEDDINGS]


def tied_head(adapter: Adapter, base: Base | None) -> Found:
    return [path for path in embeddings(adapter, base) if base is not None and base.tied]


def other_kinds(adapter: Adapter, base: Base | None) -> Found:
    kinds = {m.kind for m in adapter.modules.values()} - TGI_KINDS - EMBEDDINGS
    return sorted(kinds) if base is None else sorted(kinds & {path.rpartition(".")[2] for path in base.shapes})


def family_without_lora(adapter: Adapter, base: Base | None) -> Found:
    return [f"model_type={base.model_type}"] if base is not None and base.model_type in NO_LORA_IN_VLLM else []


def _is_another(adapter: Adapter) -> bool:
    """Whether an adapter is one of another method than LoRA, by what its config says and by its tensors."""
    kind, lora = adapter.config.get("peft_type"), bool(adapter.modules or adapter.parameters)
    return kind != "LORA" and not (lora and (not adapter.other_keys or not is_method(kind)))


def takes(base: Base | None, key: str, otherwise: bool) -> bool:
    """Whether PEFT loads a tensor of the file; ``otherwise`` where nobody asked it."""
    return otherwise if base is None or base.loaded is None else base.loaded.takes(key)


def loads_all(base: Base | None) -> bool:
    """Whether PEFT was asked, and takes every tensor of the file."""
    loaded = None if base is None else base.loaded
    return loaded is not None and not (loaded.error or loaded.unexpected or loaded.mismatched)


def _same_rows(adapter: Adapter, base: Base, key: str) -> bool:
    path = key.removeprefix(PREFIX).removesuffix(".base_layer.weight")
    return sorted(adapter.tensors[key].shape) == sorted(base.shapes.get(path, ()))


def in_saved_module(adapter: Adapter, key: str) -> bool:
    names = adapter.config.get("modules_to_save") or []
    return any(f".{name}." in f".{key}" for name in names)
