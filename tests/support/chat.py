"""A tokenizer that reads any text, so that real chat templates can be used on tiny models, and rows for them."""

from pathlib import Path

import trl
from models import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
SPECIAL = ["<pad>", "<|im_end|>", "<|im_start|>", "<bos>", "</s>", "<|end|>", "<|user|>", "<|assistant|>"]
# Pairs of characters that are one token, across the end of a marker and the beginning of an answer among them.
MERGES = [("#", "#"), ("##", "#"), ("Ċ", "Ċ"), (":", "Ċ"), (":Ċ", "Ċ"), ("Ġ", "w"), ("a", "b")]

CHATML = (
    "{%- if tools %}{{ '<|im_start|>system\n# Tools\n' }}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{%- for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['role'] == 'assistant' and enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{%- if message['content'] %}{{ message['content'] }}{% endif %}"
    "{%- if message['tool_calls'] %}{% for call in message['tool_calls'] %}"
    "{{ '<tool_call>' + call['function'] | tojson + '</tool_call>' }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
"""ChatML with tools and a switch, in words that TRL has no training template for."""


def byte_tokenizer(template: str | None = CHATML, merges=MERGES) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with few merges: every text, any template, a small vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*SPECIAL, *alphabet, *("".join(pair) for pair in merges)]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|im_end|>", bos_token="<bos>",
        additional_special_tokens=SPECIAL, model_max_length=2048,
    )  # fmt: skip
    fast.chat_template = template
    return fast


def byte_model(**overrides):
    """A tiny model with that tokenizer's vocabulary."""
    return tiny_model(vocab_size=288, max_position_embeddings=2048, eos_token_id=1, **overrides)


def template(name: str) -> str:
    """A chat template that TRL ships."""
    return (TEMPLATES / f"{name}.jinja").read_text()


def answers(row: dict, tokenizer) -> list[str]:
    """The texts of the answers of an encoded row."""
    found, current = [], []
    for token, label in zip([*row["input_ids"], None], [*row["labels"], -100], strict=True):
        if label != -100:
            assert label == token
            current.append(token)
        elif current:
            found.append(tokenizer.decode(current))
            current = []
    return found
