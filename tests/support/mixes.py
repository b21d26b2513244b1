"""Batches of very different lengths: what a suffix pass must not pad to the longest."""

import numpy as np
import torch

from echo_trainer.method.costs import ModelShape

LLAMA_7B = ModelShape(
    layers=32, first_target=4, hidden=4096, weights=202_375_168, activations=78_080, queries=4096, key_values=8192,
    itemsize=2, checkpointing=True,
)  # fmt: skip


def packed_lognormal(seed=0, documents=250, tokens=16 * 8192):
    """16 packed rows of 8k tokens, documents of log-normal lengths, a third to a half of their tokens answers."""
    generator = np.random.default_rng(seed)
    length = generator.lognormal(0.0, 1.0, documents)
    length = np.maximum((length / length.sum() * 0.95 * tokens).astype(int), 4)
    answer = np.clip((length * generator.beta(2.0, 2.5, documents)).astype(int), 2, length - 1)
    return length - answer, answer


def one_long_prompt(seed=0):
    """One prompt of 7,500 tokens among 822 short documents."""
    generator = np.random.default_rng(seed)
    prompt, answer = generator.integers(5, 150, 823), generator.integers(5, 120, 823)
    prompt[-1] = 7500
    return prompt, answer


def uniform(seed=0, documents=64):
    """Prompts of 16 to 2,048 tokens, answers of 16 to 512."""
    generator = np.random.default_rng(seed)
    return generator.integers(16, 2048, documents), generator.integers(16, 512, documents)


MIXES = {"packed-lognormal": packed_lognormal, "one-long-prompt": one_long_prompt, "uniform": uniform}


def examples_of(prompt, answer, vocabulary=60):
    """Pre-tokenised examples of these lengths."""
    return [
        {"input_ids": ids, "labels": [-100] * int(p) + ids[int(p) :]}
        for p, a in zip(prompt, answer, strict=True)
        for ids in [(torch.arange(int(p + a)) % (vocabulary - 2) + 2).tolist()]
    ]


def tokens_of(layout):
    """(tokens run, of which real, prefix tokens kept) of a layout of suffixes."""
    parts = layout.parts
    return (
        sum(part.token_RA.numel() for part in parts),
        sum(len(part.real_token) for part in parts),
        sum(len(part.prefix_n) for part in parts),
    )
