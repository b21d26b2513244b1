"""What no export can be made of: an adapter that `check` calls broken, or one that PEFT loads only in part."""

from __future__ import annotations

from typing import Any

from .base import Base
from .folder import PREFIX, Adapter, AdapterError
from .rules import apply_rules

_SHOWN = 3


class ExportError(AdapterError):
    """The export was stopped, or its result is not what PEFT computes; nothing was left behind."""


def refuse_broken(adapter: Adapter, base: Base | None) -> None:
    """
    Stop at what PEFT itself would refuse, load in part or compute wrongly, before a base is loaded.

    Args:
        adapter: its files.
        base: what it is to be loaded on, without weights; None where that is not known.

    Raises:
        ExportError: the message names the tensors or settings and the fix.
    """
    broken = [found for found in apply_rules(adapter, base) if found.rule.broken]
    # "no LoRA tensors" comes last: names that are spelt wrongly say more
    for found in sorted(broken, key=lambda found: found.rule.name == "no-lora-tensors"):
        rule = found.rule
        on = "" if base is None else f" on the base {base.name}"
        raise ExportError(f"'{adapter.folder}' is broken{on} ({rule.name}), so no form of it would be what was "
                          f"trained: {shorten(found.where)}. {rule.says} {rule.fix}")  # fmt: skip


def refuse_partly_loaded(adapter: Adapter, model: Any, missing: list[str], unexpected: list[str]) -> None:
    """
    Compare what PEFT loaded with what the file holds.

    Args:
        adapter: the adapter's files.
        model: the PEFT model that they were loaded into.
        missing: tensors of the model that the file lacks, in PEFT's names.
        unexpected: tensors of the file that the model has no place for.

    Raises:
        ExportError: a tensor was left out, or PEFT made one up that changes the model.
    """
    fix = "Give the base that it was trained on, correct or remove the tensors, or save the adapter again."
    names = [key for key in unexpected if key not in adapter.copies]
    if names:
        raise ExportError(f"'{adapter.folder}' holds tensors that PEFT has no place for on this base, so the result "
                          f"would lack them: {shorten(names)}. {fix}")  # fmt: skip
    # A module without any tensor is one that was not trained: its new B is zero and nothing changes.
    invented = [key for key in missing if _has_a_tensor(adapter, key) or _changes_something(model, key)]
    if adapter.config.get("peft_type") == "LORA" and invented:
        raise ExportError(f"'{adapter.folder}' lacks tensors that its config announces, so PEFT would make them up: "
                          f"{shorten([key.replace('.default', '') for key in invented])}. {fix}")  # fmt: skip


def shorten(names: list[str]) -> str:
    """The first few of the names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _has_a_tensor(adapter: Adapter, key: str) -> bool:
    module = PREFIX + key.partition(".lora_")[0].removeprefix(PREFIX) + ".lora_"
    return any(name.startswith(module) for name in adapter.tensors)


def _changes_something(model: Any, key: str) -> bool:
    return "lora_B" in key and bool(model.get_parameter(key).any())
