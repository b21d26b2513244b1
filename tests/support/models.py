"""Tiny random models of every family, a word-level tokenizer and data: what the tests run on."""

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 60
DEPTH = 5

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "initializer_range": 0.2,  # large enough that attention and gates do something in a random model
}
_GATED = {**_COMMON, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}

FAMILIES = {
    "llama": _GATED,
    "qwen2": {k: v for k, v in _GATED.items() if k != "head_dim"},
    "qwen3": _GATED,
    "mistral": {**_GATED, "sliding_window": 6},
    "phi3": {k: v for k, v in _GATED.items() if k != "head_dim"},
    # In float64 the eager mask overflows for rows that see nothing, so the window is wider than the padding.
    "gemma2": {**_GATED, "sliding_window": 24, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": {**_GATED, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "gpt2": {
        **{k: v for k, v in _COMMON.items() if k not in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
        "n_embd": 32, "n_layer": DEPTH, "n_head": 4, "n_positions": 128,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
    "opt": {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "attention_dropout": 0.0},
    "gpt_neox": {**_COMMON, "intermediate_size": 48},
    "olmo2": {k: v for k, v in _GATED.items() if k != "head_dim"},
}  # fmt: skip


def tiny_model(family: str = "llama", attention: str = "sdpa", dtype: torch.dtype = torch.float32, **overrides):
    """A random causal language model of a family, the same one every time."""
    torch.manual_seed(7)
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **overrides})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.to(dtype)


def lora_config(**overrides) -> LoraConfig:
    """LoRA on all linear layers, with B not zero so that the adapter does something from the start."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
    return LoraConfig(task_type="CAUSAL_LM", **{**settings, **overrides})


def adapted(model, **overrides):
    """The model with a random adapter, the same one every time."""
    torch.manual_seed(11)
    return get_peft_model(model, lora_config(**overrides))


WORDS = ["<pad>", "</s>", "<unk>", "user", "assistant", ":", "\n", *[f"w{i}" for i in range(VOCABULARY - 7)]]

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' : ' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + ' </s>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer over "w0 w1 ...", with a chat template that marks the assistant's tokens."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=128
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def words(generator: torch.Generator, low: int, high: int) -> str:
    """Between `low` and `high` random words."""
    n = int(torch.randint(low, high + 1, (1,), generator=generator))
    return " ".join(f"w{int(i)}" for i in torch.randint(0, VOCABULARY - 7, (n,), generator=generator))


def prompt_completion_rows(n: int, seed: int = 0) -> list[dict[str, str]]:
    """Prompt-completion examples of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {"prompt": words(generator, 4, 12), "completion": " " + words(generator, 2, 6)} for _ in range(n)
    ]  # the trainer appends the end-of-sequence token


def conversation_rows(n: int, seed: int = 0, turns: int = 2) -> list[dict]:
    """Multi-turn conversations in the `messages` format."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "messages": [
                message
                for _ in range(turns)
                for message in (
                    {"role": "user", "content": words(generator, 3, 6)},
                    {"role": "assistant", "content": words(generator, 2, 4)},
                )
            ]
        }
        for _ in range(n)
    ]
