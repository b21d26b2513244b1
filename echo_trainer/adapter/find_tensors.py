"""What the rules on names, shapes and values of tensors look for; see `find` for the form of the functions.

Where the base is known PEFT was asked (`peft_load`), and what it loads is not called broken, whatever it looks like.
"""

# ruff: noqa: D103

from __future__ import annotations

from .base import Base
from .find import Found, bias_tensors, biases_without_a_place, in_saved_module, loads_all, settings, takes
from .find_variants import OTHER_VARIANTS
from .folder import PREFIX, Adapter, LoraModule

FLOATS = {"F64", "F32", "F16", "BF16"}


def rank_disagrees(adapter: Adapter, base: Base | None) -> Found:
    found = []
    for module in adapter.complete:
        (rank_a, _), (_, rank_b) = adapter.shapes(module)
        if {rank_a, rank_b} != {adapter.rank(module)} and not _loaded(base, module):
            found.append(f"{module.path}: config {adapter.rank(module)}, lora_A {rank_a}, lora_B {rank_b}")
    return found


def shape_disagrees(adapter: Adapter, base: Base | None) -> Found:
    if base is None:  # widths differ between layers of some families
        return []
    found = []
    for module in adapter.complete:
        size = (adapter.shapes(module)[1][0], adapter.shapes(module)[0][1])
        expected = base.shapes.get(module.path, size)
        if size != expected and not _loaded(base, module):
            found.append(f"{module.path}: (out, in) is {size}, should be {expected}")
    return found


def unknown_kind(adapter: Adapter, base: Base | None) -> Found:
    if base is None:
        return []
    kinds = {path.rpartition(".")[2] for path in base.shapes}
    return [m.path for m in adapter.modules.values() if not _loaded(base, m) and m.kind not in kinds]


def unknown_module(adapter: Adapter, base: Base | None) -> Found:
    named_otherwise = {path for path in adapter.modules if not _has_prefix(adapter, path)}
    odd = set(unknown_kind(adapter, base)) | named_otherwise
    if base is None:
        return []
    unplaced = [m.path for m in adapter.modules.values() if not _loaded(base, m)]
    return [path for path in unplaced if path not in base.shapes and path not in odd]


def key_prefix(adapter: Adapter, base: Base | None) -> Found:
    keys = [key for m in adapter.modules.values() for key in m.keys.values() if not key.startswith(PREFIX)]
    return [key for key in keys if not takes(base, key, otherwise=False)]


def key_suffix(adapter: Adapter, base: Base | None) -> Found:
    odd = [key for key in adapter.other_keys if "lora_A" in key or ("lora_B" in key and not key.endswith(".bias"))]
    return [key for key in odd if not takes(base, key, otherwise=False)]


def adapter_name(adapter: Adapter, base: Base | None) -> Found:
    modules = [*adapter.modules.values(), *adapter.parameters.values()]
    return [key for module in modules for key in module.keys.values() if ".default" in key]


def foreign_tensors(adapter: Adapter, base: Base | None) -> Found:
    known = {*key_suffix(adapter, base), *bias_tensors(adapter, base), *biases_without_a_place(adapter, base)}
    known |= {k for k in adapter.other_keys if "lora_magnitude" in k or in_saved_module(adapter, k)}
    if adapter.config.get("trainable_token_indices"):
        known |= {k for k in adapter.other_keys if k.endswith("trainable_tokens_delta")}
    if (base is None or base.loaded is None) and settings(adapter, OTHER_VARIANTS):
        known |= {k for k in adapter.other_keys if ".lora_" in k}  # they have tensors of their own
    rest = [k for k in adapter.other_keys if k not in known and not k.endswith(".base_layer.weight")]
    return [key for key in rest if not takes(base, key, otherwise=False)]


def b_missing(adapter: Adapter, base: Base | None) -> Found:
    return [m.keys["A"] for m in adapter.modules.values() if "B" not in m.keys]


def a_missing(adapter: Adapter, base: Base | None) -> Found:
    return [m.keys["B"] for m in adapter.modules.values() if "A" not in m.keys]


def not_a_matrix(adapter: Adapter, base: Base | None) -> Found:
    keys = [key for m in adapter.modules.values() for key in m.keys.values()]
    odd = [k for k in keys if len(s := adapter.tensors[k].shape) != 2 or 0 in s]
    return [f"{k} has shape {adapter.tensors[k].shape}" for k in odd if not takes(base, k, otherwise=False)]


def not_floating(adapter: Adapter, base: Base | None) -> Found:
    return [f"{key} is {t.dtype}" for key, t in adapter.tensors.items() if t.dtype not in FLOATS]


def outside_targets(adapter: Adapter, base: Base | None) -> Found:
    if base is not None and base.loaded is not None:
        modules = [m for m in adapter.modules.values() if _has_prefix(adapter, m.path) and m.path in base.shapes]
        return [m.path for m in modules if base.loaded.unexpected & {*m.keys.values()}]
    return [path for path in adapter.modules if adapter.config.get("target_modules") and not adapter.targets(path)]


def non_finite(adapter: Adapter, base: Base | None) -> Found:
    """Reads the values; every other rule reads headers only."""
    return adapter.non_finite


def not_loaded(adapter: Adapter, base: Base | None) -> Found:
    """All that PEFT does not load, in its own words; said where no other rule has found why."""
    if base is None or base.loaded is None or loads_all(base):
        return []
    return [base.loaded.error] if base.loaded.error else sorted(base.loaded.unexpected | base.loaded.mismatched)


def _loaded(base: Base | None, module: LoraModule) -> bool:
    return all(takes(base, key, otherwise=False) for key in module.keys.values())


def _has_prefix(adapter: Adapter, path: str) -> bool:
    return all(key.startswith(PREFIX) for key in adapter.modules[path].keys.values())
