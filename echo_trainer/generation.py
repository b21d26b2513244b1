"""Greedy answers from a model, batched and left-padded with masks, the same for every batch size."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    advance: Callable[[int], None] | None = None,
) -> list[str]:
    """
    What the model writes after each prompt, greedily, until its end-of-sequence token.

    Args:
        model: a causal language model (or PeftModel); it is put into evaluation mode.
        tokenizer: its tokenizer, with a pad token.
        prompts: prompts as text.
        max_new_tokens: longest answer, in tokens.
        batch_size: prompts generated at a time. Prompts are sorted by length, so padding is short.
        advance: called with the number of prompts finished, for a progress bar.

    Returns:
        The answers in the order of the prompts, without special tokens.
    """
    model.eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for start in range(0, len(prompts), batch_size):
        rows = order[start : start + batch_size]
        batch = tokenizer([prompts[i] for i in rows], return_tensors="pt", padding=True, padding_side="left").to(
            model.device
        )
        batch.pop("token_type_ids", None)
        output = model.generate(
            **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(rows, texts, strict=True):
            answers[i] = text
        if advance is not None:
            advance(len(rows))
    return answers


def exact_match(answers: list[str], references: list[str]) -> float:
    """
    Share of answers that equal their reference, white space at the ends aside.

    Raises:
        ValueError: nothing to compare, or unequal numbers of answers and references.
    """
    if not answers or len(answers) != len(references):
        raise ValueError(f"{len(answers)} answers cannot be compared with {len(references)} references.")
    return sum(a.strip() == b.strip() for a, b in zip(answers, references, strict=True)) / len(answers)
