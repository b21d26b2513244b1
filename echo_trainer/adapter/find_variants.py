"""What the rules on variants of LoRA look for: other initialisations, experts, towers; see `find` for the form."""

# ruff: noqa: D103

from __future__ import annotations

from typing import Any

from .base import Base
from .find import Found, settings
from .folder import Adapter

HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")  # they leave the base weights as they were
# PEFT takes the same part out of the base again when it loads the adapter (loftq was read, it needs a GPU).
REPEATED_INITS = ("pissa", "olora", "loftq")
OTHER_VARIANTS = ("kasa_config", "arrow_config", "monteclora_config", "megatron_config", "velora_config")

# Seen in vLLM 0.32.0: models with `is_3d_moe_weight`, and models whose experts hang elsewhere than in transformers.
FUSED_IN_VLLM = {"gpt_oss", "interns1_pro", "qwen3_5_moe", "qwen3_omni_moe", "qwen3_vl_moe"}
RENAMED_IN_VLLM = {"minimax", "mixtral", "phimoe"}


def changes_base(config: dict[str, Any]) -> str | None:
    """The name of an initialisation that changed the base weights (PiSSA, OLoRA, CorDA, LoftQ ...), or None."""
    init = config.get("init_lora_weights", True)
    return init if isinstance(init, str) and init.lower() not in HARMLESS_INITS else None


def unrepeated_init_of(config: dict[str, Any]) -> str | None:
    """The name of an initialisation that changed the base, and that PEFT does not repeat when it loads; or None."""
    init = changes_base(config)
    return init if init and init.lower() not in REPEATED_INITS else None


def repeated_init(adapter: Adapter, base: Base | None) -> Found:
    init = changes_base(adapter.config)
    return [f"init_lora_weights={init!r}"] if init and init.lower() in REPEATED_INITS else []


def unrepeated_init(adapter: Adapter, base: Base | None) -> Found:
    init = unrepeated_init_of(adapter.config)
    return [f"init_lora_weights={init!r}"] if init else []


def replicated_layers(adapter: Adapter, base: Base | None) -> Found:
    return settings(adapter, ["layer_replication"])


def activated(adapter: Adapter, base: Base | None) -> Found:
    return settings(adapter, ["alora_invocation_tokens"])


def refused_variant(adapter: Adapter, base: Base | None) -> Found:
    return settings(adapter, ["use_bdlora", "use_qalora"])


def other_variant(adapter: Adapter, base: Base | None) -> Found:
    plain = [path for path in adapter.parameters if path not in _experts(adapter)]
    return settings(adapter, OTHER_VARIANTS) + [f"{path} is a bare parameter" for path in plain]


def experts_served(adapter: Adapter, base: Base | None) -> Found:
    return _experts(adapter) if _in_vllm(adapter, base) == "served" else []


def experts_refused(adapter: Adapter, base: Base | None) -> Found:
    return _experts(adapter) if _in_vllm(adapter, base) == "refused" else []


def experts_elsewhere(adapter: Adapter, base: Base | None) -> Found:
    return _experts(adapter) if _in_vllm(adapter, base) == "left out" else []


def experts_unknown(adapter: Adapter, base: Base | None) -> Found:
    return _experts(adapter) if base is None else []


def outside_language_model(adapter: Adapter, base: Base | None) -> Found:
    return [] if base is None else [path for path in adapter.modules if path in base.towers]


def _in_vllm(adapter: Adapter, base: Base | None) -> str | None:
    """What becomes of fused experts in vLLM; None where the base is not known."""
    if base is None:
        return None
    experts = set(_experts(adapter))
    outer = {path for path in experts if not path.endswith(".base_layer")}
    both = experts == outer | {f"{path}.base_layer" for path in outer}
    if base.model_type in RENAMED_IN_VLLM:
        return "left out"
    return "served" if both and base.model_type in FUSED_IN_VLLM else "refused"


def _experts(adapter: Adapter) -> Found:
    return [path for path in adapter.parameters if "experts" in path.split(".")]
