"""Whether the suffix pass is exact for a model, decided from its configuration before training."""

import logging

from torch import nn

from .layers import decoder_layers
from .suffix_cache import cache_argument

logger = logging.getLogger(__name__)

# Layers whose past is their keys and values, each token's independent of how many follow.
_EXACT_LAYER_TYPES = {"full_attention", "sliding_attention"}
# Rotary embeddings that depend on a token's position alone, not on the length of the sequence it is in.
_EXACT_ROPE_TYPES = {"default", "linear", "llama3", "yarn", "proportional"}
_ATTENTION_KERNELS = {"eager", "sdpa", "flash_attention_2", "flash_attention_3"}


def choose_suffix(model: nn.Module, echo_pass: str) -> bool:
    """
    Whether the echo pass runs the suffix only; says once why not where it cannot.

    Args:
        model: the causal language model below the PeftModel.
        echo_pass: "auto", "suffix" or "full".

    Raises:
        ValueError: "suffix" was asked for and would not be exact.
    """
    if echo_pass == "full":
        return False
    obstacle = suffix_obstacle(model)
    if obstacle is None:
        return True
    if echo_pass == "suffix":
        raise ValueError(
            f"echo_pass='suffix' cannot be exact for this model: {obstacle}. Use echo_pass='auto' or 'full'."
        )
    logger.warning("The echo pass runs whole sequences (about twice the price of LoRA): %s.", obstacle)
    return False


def suffix_obstacle(model: nn.Module) -> str | None:
    """
    Why the suffix pass would not be exact for this model, or None if it is.

    Args:
        model: the causal language model below the PeftModel.
    """
    config = model.config.get_text_config()
    if config is not model.config:
        return "a vision-language model mixes images into the prompt"
    if cache_argument(decoder_layers(model)) is None:
        return f"the decoder layers of {type(model).__name__} take no cache of keys and values"
    others = set(getattr(config, "layer_types", None) or []) - _EXACT_LAYER_TYPES
    if others:
        return f"layers of type {', '.join(sorted(others))} keep no keys and values of their past"
    if getattr(config, "num_kv_shared_layers", 0):
        return "some layers share the keys and values of others"
    ropes = _rope_types(getattr(config, "rope_parameters", None) or {}) - _EXACT_ROPE_TYPES
    if ropes:
        return f"rotary embeddings of type {', '.join(sorted(ropes))} depend on the length of the sequence"
    if config._attn_implementation not in _ATTENTION_KERNELS:
        return f"the attention kernel {config._attn_implementation!r} is unknown"
    if getattr(config, "alibi", False):
        return "ALiBi biases depend on the width of the mask"
    return None


def _rope_types(parameters: dict) -> set[str]:
    """Rotary types of a model: one set of parameters, or one for each type of layer."""
    if "rope_type" in parameters:
        return {parameters["rope_type"]}
    return {inner["rope_type"] for inner in parameters.values() if isinstance(inner, dict) and "rope_type" in inner}
