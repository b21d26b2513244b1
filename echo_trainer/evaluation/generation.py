"""Answers from a model, batched and left-padded with masks, the same for every batch size."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

NEUTRAL: dict[str, Any] = {
    "do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0, "length_penalty": 1.0, "min_length": 0, "num_return_sequences": 1,
}  # fmt: skip
"""A model's own generation_config may ask for sampling or penalties; an answer must not depend on it."""


@torch.no_grad()
def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    advance: Callable[[int], None] | None = None,
    num_beams: int = 1,
    special_tokens: bool = True,
    stop: Callable[[str], Any] | None = None,
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
        num_beams: beams of a beam search; 1 is greedy, 4 is the protocol of LLM-Adapters.
        special_tokens: whether the tokenizer adds its special tokens; a rendered chat template has them already.
        stop: called with the text written so far; once it returns something true, that row ends. A row ends at the
            same token whatever the batch. Not used with beams.

    Returns:
        The answers in the order of the prompts, without special tokens.
    """
    model.eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for start in range(0, len(prompts), batch_size):
        rows = order[start : start + batch_size]
        batch = tokenizer(
            [prompts[i] for i in rows],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=special_tokens,
        ).to(model.device)
        batch.pop("token_type_ids", None)
        width = batch["input_ids"].shape[1]
        criteria = [_StopAtText(tokenizer, width, stop)] if stop is not None and num_beams == 1 else None
        output = cast(Any, model).generate(
            **batch,
            **NEUTRAL,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            pad_token_id=pad_token_id(tokenizer),
            eos_token_id=end_tokens(model, tokenizer),
            stopping_criteria=criteria,
        )
        texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
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


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills a batch; masked everywhere, so the end-of-sequence token serves where there is no other."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return cast("int", tokenizer.pad_token_id)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the tokenizer's, as training appends it, and those of the model's configuration."""
    given = model.generation_config.eos_token_id
    listed = given if isinstance(given, list) else [given]
    return sorted({token for token in [tokenizer.eos_token_id, *listed] if token is not None})


class _StopAtText(StoppingCriteria):
    """Ends each row of a batch by itself, once `stop` returns something true for what it has written."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, width: int, stop: Callable[[str], Any]):
        self.tokenizer, self.width, self.stop = tokenizer, width, stop

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.width :], skip_special_tokens=True)
        return torch.tensor([bool(self.stop(text)) for text in texts], device=input_ids.device)
