"""Make the base: a decoder of about a million parameters, trained on the task from nothing (supervised, all weights).

    python recipes/polynomials/make_base.py polynomials-base

About ten minutes on one core. The folder then holds the model, its tokenizer and, in `prompts/`, rows to train on with
a verifier and rows to test with; it is what every arm starts from.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from polynomials import EQUALS, make_rows
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEST_SEED, TEST_ROWS, PROMPT_SEED, PROMPT_ROWS = 10, 600, 1000, 3000
ROWS, BATCH, RATE = 120_000, 128, 1.5e-3
IGNORED = -100


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word of `polynomials.to_text`."""
    words = ["<pad>", "<s>", "</s>", EQUALS, "+", "-", *"0123456789"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int, width: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            num_key_value_heads=width // 32,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def batches(rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast, seed: int):
    """Batches of rows of like length, in random order: ids and labels (B, T), padded on the right."""
    encoded = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        encoded.append((prompt + answer, [IGNORED] * len(prompt) + answer))
    generator = random.Random(seed)
    generator.shuffle(encoded)
    groups = []
    for start in range(0, len(encoded), 50 * BATCH):
        part = sorted(encoded[start : start + 50 * BATCH], key=lambda pair: len(pair[0]))
        part = [part[i : i + BATCH] for i in range(0, len(part), BATCH)]
        generator.shuffle(part)
        groups += part
    for group in groups:
        length = max(len(ids) for ids, _ in group)
        ids = torch.tensor([ids + [tokenizer.pad_token_id] * (length - len(ids)) for ids, _ in group])
        labels = torch.tensor([labels + [IGNORED] * (length - len(labels)) for _, labels in group])
        yield ids, labels


def train(model: LlamaForCausalLM, rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    steps = math.ceil(len(rows) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, betas=(0.9, 0.98))
    shape = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    begun = time.perf_counter()
    for step, (ids, labels) in enumerate(batches(rows, tokenizer, seed)):
        # Padding is on the right, behind everything that is learnt, so a causal model needs no mask.
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        shape.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}/{steps}, loss {loss.item():.3f}, {time.perf_counter() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, arguments.seed, arguments.width, arguments.layers)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    test = make_rows(TEST_ROWS, TEST_SEED)
    rows = make_rows(arguments.rows, arguments.seed, frozenset(row["prompt"] for row in test))
    train(model, rows, tokenizer, arguments.seed)
    model.save_pretrained(arguments.folder)
    tokenizer.save_pretrained(arguments.folder)
    prompts = make_rows(PROMPT_ROWS, PROMPT_SEED, frozenset(row["prompt"] for row in test))
    (arguments.folder / "prompts").mkdir(exist_ok=True)
    for split, part in (("train", prompts), ("test", test)):
        lines = "\n".join(json.dumps({"prompt": row["prompt"], "answer": row["completion"]}) for row in part)
        (arguments.folder / "prompts" / f"{split}.jsonl").write_text(lines + "\n", encoding="utf-8")
