"""What the rules on names, shapes and values of tensors look for; see `adapter.find` for the form of the functions."""

# ruff: noqa: D103

from __future__ import annotations

from .base import Base
from .find import Found, bias_tensors, by_kind, in_saved_module
from .folder import PREFIX, Adapter

FLOATS = {"F64", "F32", "F16", "BF16"}


def rank_disagrees(adapter: Adapter, base: Base | None) -> Found:
    found = []
    for module in adapter.complete:
        (rank_a, _), (_, rank_b) = adapter.shapes(module)
        if {rank_a, rank_b} != {adapter.rank(module)}:
            found.append(f"{module.path}: config {adapter.rank(module)}, lora_A {rank_a}, lora_B {rank_b}")
    return found


def shape_disagrees(adapter: Adapter, base: Base | None) -> Found:
    found = []
    for modules in by_kind(adapter).values():
        sizes = {m.path: (adapter.shapes(m)[1][0], adapter.shapes(m)[0][1]) for m in modules}
        usual = max(sizes.values(), key=list(sizes.values()).count)
        for path, size in sizes.items():
            expected = usual if base is None else base.shapes.get(path, size)
            if size != expected:
                found.append(f"{path}: (out, in) is {size}, should be {expected}")
    return found


def unknown_kind(adapter: Adapter, base: Base | None) -> Found:
    kinds = set() if base is None else {path.rpartition(".")[2] for path in base.shapes}
    return [m.path for m in adapter.modules.values() if base is not None and m.kind not in kinds]


def unknown_module(adapter: Adapter, base: Base | None) -> Found:
    named_otherwise = {path for path in adapter.modules if not _has_prefix(adapter, path)}
    odd = set(unknown_kind(adapter, base)) | named_otherwise
    return [path for path in adapter.modules if base is not None and path not in base.shapes and path not in odd]


def key_prefix(adapter: Adapter, base: Base | None) -> Found:
    return [key for m in adapter.modules.values() for key in m.keys.values() if not key.startswith(PREFIX)]


def key_suffix(adapter: Adapter, base: Base | None) -> Found:
    return [key for key in adapter.other_keys if "lora_A" in key or ("lora_B" in key and not key.endswith(".bias"))]


def foreign_tensors(adapter: Adapter, base: Base | None) -> Found:
    known = {*key_suffix(adapter, base), *bias_tensors(adapter, base)}
    known |= {k for k in adapter.other_keys if "lora_magnitude" in k or in_saved_module(adapter, k)}
    return [k for k in adapter.other_keys if k not in known and not k.endswith(".base_layer.weight")]


def b_missing(adapter: Adapter, base: Base | None) -> Found:
    return [m.keys["A"] for m in adapter.modules.values() if "B" not in m.keys]


def a_missing(adapter: Adapter, base: Base | None) -> Found:
    return [m.keys["B"] for m in adapter.modules.values() if "A" not in m.keys]


def not_a_matrix(adapter: Adapter, base: Base | None) -> Found:
    keys = [key for m in adapter.modules.values() for key in m.keys.values()]
    return [f"{k} has shape {s}" for k in keys if len(s := adapter.tensors[k].shape) != 2 or 0 in s]


def not_floating(adapter: Adapter, base: Base | None) -> Found:
    return [f"{key} is {t.dtype}" for key, t in adapter.tensors.items() if t.dtype not in FLOATS]


def outside_targets(adapter: Adapter, base: Base | None) -> Found:
    return [path for path in adapter.modules if adapter.config.get("target_modules") and not adapter.targets(path)]


def non_finite(adapter: Adapter, base: Base | None) -> Found:
    """Reads the values; every other rule reads headers only."""
    return adapter.non_finite


def _has_prefix(adapter: Adapter, path: str) -> bool:
    return all(key.startswith(PREFIX) for key in adapter.modules[path].keys.values())
