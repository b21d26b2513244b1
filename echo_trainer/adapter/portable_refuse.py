"""What cannot be rewritten into the portable form without loss, and what does not fit its config or its base."""

from __future__ import annotations

import json

from peft import LoraConfig

from .base import Base
from .find_variants import changes_base
from .folder import CONFIG_NAME, PREFIX, Adapter, AdapterError

# Settings that the rewriting takes care of, or that matter in training only.
_HANDLED = {"alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config",
            "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
            "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config",
            "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
            "target_modules", "task_type", "trainable_token_indices", "use_dora", "use_rslora",
            "velora_config"}  # fmt: skip


class NotPortableError(AdapterError):
    """The adapter is more than s B A on the base's linear layers, so no plain LoRA is equal to it."""


def refuse_what_is_not_lora(adapter: Adapter) -> None:
    """
    Stop at settings that make an adapter more than LoRA.

    Raises:
        NotPortableError: another method, DoRA, a changed base, saved modules, trained tokens, a variant of LoRA.
    """
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


def refuse_foreign_tensors(adapter: Adapter, base: Base) -> None:
    """
    Stop at tensors that are no part of a LoRA, or do not fit the config or the base.

    Raises:
        NotPortableError: a tensor that a plain LoRA would lose.
        AdapterError: other files, no LoRA tensors, unknown modules, wrong shapes.
    """
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
