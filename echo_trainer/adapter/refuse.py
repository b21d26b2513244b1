"""What no export can be made of: an adapter that `check` calls broken, or one that PEFT loads only in part."""

from __future__ import annotations

from typing import Any

from . import find_tensors
from .base import Base
from .folder import PREFIX, Adapter, AdapterError
from .rules import RULES

# No form holds what was trained: PEFT itself would skip, invent or multiply wrongly.
BROKEN = {"bad-number", "magnitudes-without-flag", "magnitudes-missing", "key-prefix", "key-suffix", "b-missing",
          "a-missing", "not-floating", "non-finite"}  # fmt: skip
# Right of an ordinary LoRA only; variants, saved modules and trained tokens may well have other names and shapes.
BROKEN_IF_PLAIN = {"missing-setting", "no-lora-tensors", "rank-disagrees", "outside-targets"}
_VARIANTS = ("layer_replication", "target_parameters", "megatron_config", "use_bdlora", "use_qalora")
_MORE = ("modules_to_save", "trainable_token_indices")
_SHOWN = 3


class ExportError(AdapterError):
    """The export was stopped, or its result is not what PEFT computes; nothing was left behind."""


def refuse_broken(adapter: Adapter) -> None:
    """
    Stop at what `check` finds broken in the files themselves, before a base is loaded.

    Raises:
        ExportError: a rule of `BROKEN` applies; the message names the tensors or settings and the fix.
    """
    names = (BROKEN | BROKEN_IF_PLAIN if _is_plain(adapter) else BROKEN) if _is_lora(adapter) else {"non-finite"}
    # "no LoRA tensors" comes last: names that are spelt wrongly say more
    for rule in sorted(
        (rule for rule in RULES if rule.name in names), key=lambda rule: rule.name == "no-lora-tensors"
    ):
        if where := rule.broken_by(adapter, None):
            raise ExportError(f"'{adapter.folder}' is broken ({rule.name}), so no form of it would be what was "
                              f"trained: {shorten(where)}. {rule.says} {rule.fix}")  # fmt: skip


def refuse_other_base(adapter: Adapter, base: Base) -> None:
    """
    Stop at a base whose layers have other sizes than the adapter's.

    Raises:
        ExportError: the message names the modules.
    """
    if _is_lora(adapter) and _is_plain(adapter, but=()) and (where := find_tensors.shape_disagrees(adapter, base)):
        raise ExportError(f"'{adapter.folder}' does not fit the base {base.name}: {shorten(where)}. Give the base "
                          f"that the adapter was trained on: --base BASE.")  # fmt: skip


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
    if unexpected:
        names = [key.replace(".default", "") for key in unexpected]
        raise ExportError(f"'{adapter.folder}' holds tensors that PEFT has no place for on this base, so the result "
                          f"would lack them: {shorten(names)}. {fix}")  # fmt: skip
    # A module without any tensor is one that was not trained: its new B is zero and nothing changes.
    invented = [key for key in missing if _has_a_tensor(adapter, key) or _changes_something(model, key)]
    if _is_lora(adapter) and invented:
        raise ExportError(f"'{adapter.folder}' lacks tensors that its config announces, so PEFT would make them up: "
                          f"{shorten([key.replace('.default', '') for key in invented])}. {fix}")  # fmt: skip


def shorten(names: list[str]) -> str:
    """The first few of the names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _is_lora(adapter: Adapter) -> bool:
    return adapter.config.get("peft_type") == "LORA"


def _is_plain(adapter: Adapter, but: tuple[str, ...] = _MORE) -> bool:
    return not any(adapter.config.get(name) for name in (*_VARIANTS, *but))


def _has_a_tensor(adapter: Adapter, key: str) -> bool:
    module = PREFIX + key.partition(".lora_")[0].removeprefix(PREFIX) + ".lora_"
    return any(name.startswith(module) for name in adapter.tensors)


def _changes_something(model: Any, key: str) -> bool:
    return "lora_B" in key and bool(model.get_parameter(key).any())
