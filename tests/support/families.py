"""Tiny random models of every causal family that transformers knows and that can be made tiny.

A family's config is asked for its fields, and those whose meaning is known get small values; `SPECIAL` holds what a
family needs beyond that. So a family that a new release brings is tried without a line written for it.
"""

from typing import Any

import torch
from models import VOCABULARY
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

DEPTH = 5
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": DEPTH,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1, "initializer_range": 0.2,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "num_experts_per_token": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "expert_ffn_hidden_size": 16,
    "moe_ffn_hidden_size": 16, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "ffn_dim": 48, "decoder_ffn_dim": 48, "ffn_hidden_size": 48, "sliding_window": 24,
    # Passes are compared, so nothing may be drawn.
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "dropout": 0.0, "attention_dropout": 0.0,
    "hidden_dropout": 0.0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "activation_dropout": 0.0,
    "layerdrop": 0.0, "resid_dropout": 0.0, "embedding_dropout": 0.0, "embd_dropout": 0.0,
}  # fmt: skip
_MLA = {"num_key_value_heads": 4}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 2, "mamba_n_groups": 1,
          "mamba_chunk_size": 8}  # fmt: skip

SPECIAL: dict[str, dict[str, Any]] = {
    "axk1": _MLA, "axk2": _MLA, "deepseek_v2": _MLA, "deepseek_v3": _MLA, "deepseek_v32": _MLA, "glm4_moe_lite": _MLA,
    "glm_moe_dsa": _MLA, "longcat_flash": _MLA, "minicpm3": _MLA, "sarvam_mla": _MLA, "youtu": _MLA,
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention", "mamba", "attention", "mamba"],
                         "shared_intermediate_size": 16},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8, "expand": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
              "mamba_d_state": 8, "mamba_dt_rank": 8, "use_mamba_kernels": False},
    "codegen": {"rotary_dim": 4, "n_inner": 48}, "gptj": {"rotary_dim": 4, "n_inner": 48},
    "falcon": {"head_dim": ..., "num_key_value_heads": ..., "num_kv_heads": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2], [["global"], 1]], "window_size": 24},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention", "conv"], "block_auto_adjust_ff_dim":
             False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention", "conv"], "num_dense_layers": 1},
    "llama4_text": {"intermediate_size_mlp": 48, "attention_chunk_size": 24, "moe_layers": [1, 3]},
    "gemma2": {"sliding_window": 24, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": {"query_pre_attn_scalar": 8},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": ["full_attention", "sliding_attention"] * 2 +
                     ["full_attention"], "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
                     "laurel_rank": 8, "altup_num_inputs": 2, "intermediate_size": 48, "activation_sparsity_pattern":
                     None},
    "gemma4_text": {"num_kv_shared_layers": 2, "layer_types": ["full_attention", "sliding_attention"] * 2 +
                    ["full_attention"], "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
                    "global_head_dim": 8},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 24, "block_types": ["recurrent", "attention"],
                        "logits_soft_cap": 5.0},
    "mpt": {"d_model": 32, "expansion_ratio": 2, "max_seq_len": 128},
    "opt": {"word_embed_proj_dim": 32},
    "qwen3_next": {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
                   "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"] * 2 +
                   ["linear_attention"]},
    "xlm-roberta": {}, "xmod": {"default_language": "en_XX"},
    "zamba2": {**_MAMBA, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba"],
               "hybrid_layer_ids": [1, 3], "num_mem_blocks": 1},
    "dots1": {"n_shared_experts": 1},
}  # fmt: skip


def family_config(family: str, **overrides: Any) -> Any:
    """A tiny config of a family; `...` as a value leaves a field as the family has it."""
    known = AutoConfig.for_model(family).get_text_config()
    values = {}
    for name, value in {**_SMALL, **SPECIAL.get(family, {}), **overrides}.items():
        chosen = name in overrides or name in SPECIAL.get(family, {})
        if value is not ... and (chosen or _has(known, name)):
            values[name] = value
    return AutoConfig.for_model(family, **values)


def family_model(
    family: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32, **overrides: Any
) -> torch.nn.Module:
    """A tiny random model of a family, the same one every time, not larger than 30 million parameters."""
    config = family_config(family, **overrides)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > 3e7:
        raise ValueError(f"{family} has {size} parameters")
    torch.manual_seed(7)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype)


def causal_families() -> list[str]:
    """Every model type that `AutoModelForCausalLM` knows."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _has(config: Any, name: str) -> bool:
    try:
        return hasattr(config, name)
    except Exception:  # a field that differs from layer to layer
        return False


def vision_language_model(family: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A tiny vision-language model, for rows of text alone."""
    text = {k: v for k, v in _SMALL.items() if k in _TEXT}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 8}  # fmt: skip
    configs = {
        "llava": {"text_config": {"model_type": "llama", **text}, "vision_config": {"model_type": "clip_vision_model",
                  **vision}, "image_token_index": 59},
        "gemma3": {"text_config": {**text, "query_pre_attn_scalar": 8, "sliding_window": 24},
                   "vision_config": vision, "mm_tokens_per_image": 4, "image_token_index": 59},
        "qwen2_vl": {"text_config": {**text, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                     "mrope_section": [1, 1, 2]}}, "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 32,
                     "num_heads": 2, "mlp_ratio": 1, "patch_size": 8}, "image_token_id": 59, "video_token_id": 58},
    }  # fmt: skip
    torch.manual_seed(7)
    config = AutoConfig.for_model(family, **configs[family])
    return AutoModelForImageTextToText.from_config(config, attn_implementation=attention).to(dtype)


_TEXT = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
         "num_key_value_heads", "max_position_embeddings", "pad_token_id", "eos_token_id",
         "initializer_range"}  # fmt: skip
vision_language_model.families = ("llava", "gemma3", "qwen2_vl")
