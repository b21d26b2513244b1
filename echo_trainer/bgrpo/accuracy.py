"""How often an answer is among the beams, by beam width; and the picture of it."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..plots import ECHO, INK, PLAIN, figure, legend_below, tidy, write
from .beams import beam_options, refuse_empty
from .verifier import Verifier, score_of

WIDTHS = (1, 2, 5, 10)


@torch.no_grad()
def best_scores(
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    verifier: Verifier,
    width: int,
    max_new_tokens: int,
    batch_size: int = 32,
    options: dict[str, Any] | None = None,
    template: dict[str, Any] | None = None,
) -> list[float]:
    """
    The score of the best beam of each row: what a user gets who looks through all of them with the verifier.

    Args:
        model: a causal language model, or an adapter on one.
        tokenizer: of the model.
        rows: each with `prompt` (text, or a list of messages) and what the verifier reads.
        verifier: of a completion.
        width: beam width; 1 is greedy.
        max_new_tokens: longest completion.
        batch_size: rows whose beams are searched at a time.
        options: of `generate`, such as a trainer's `generation_kwargs`, which go before those of the model.
        template: keyword arguments of the chat template.
    """
    training, side = model.training, tokenizer.padding_side
    tokenizer.padding_side = "left"
    model.eval()
    longest = {"pad_token_id": tokenizer.pad_token_id, **(options or {}), "max_new_tokens": max_new_tokens}
    search = beam_options(longest, width)
    given: Any = search.get("eos_token_id", model.generation_config.eos_token_id)
    ends: set[int] = {given} if isinstance(given, int) else set(given or ())
    found = []
    try:
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            inputs = _encoded(tokenizer, [row["prompt"] for row in part], template or {}).to(model.device)
            ids = model.generate(**inputs, **search)
            answers = [_until_end(row, ends) for row in ids[:, inputs["input_ids"].shape[1] :].tolist()]
            texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
            for i, row in enumerate(part):
                others = {name: value for name, value in row.items() if name != "prompt"}
                beams = texts[i * width : (i + 1) * width]
                found.append(max(score_of(verifier, row["prompt"], _as(row["prompt"], b), others) for b in beams))
    finally:
        model.train(training)
        tokenizer.padding_side = side
    return found


def accuracy_by_width(
    model: Any,
    tokenizer: Any,
    rows: Any,
    verifier: Verifier,
    max_new_tokens: int,
    widths: Iterable[int] = WIDTHS,
    **how: Any,
) -> dict[int, float]:
    """The mean of `best_scores` for each width; `how` are `options` and `template`."""
    rows = list(rows)
    scores = {width: best_scores(model, tokenizer, rows, verifier, width, max_new_tokens, **how) for width in widths}
    return {width: sum(found) / len(found) for width, found in scores.items()}


def before_and_after(before: dict[int, float], after: dict[int, float], n: int) -> list[dict[str, Any]]:
    """Accuracies of a run by width, as its record and card have them; `n` is the number of prompts."""
    return [{"width": width, "before": before[width], "after": after[width], "n": n} for width in before]


def draw(accuracy: list[dict[str, Any]], path: str | Path) -> Path:
    """The picture of `before_and_after`."""
    drawn = figure(6, 4)
    axis = drawn.subplots()
    widths = [row["width"] for row in accuracy]
    for name, colour, dashes in (("before", PLAIN, "--"), ("after", ECHO, "-")):
        axis.plot(widths, [row[name] for row in accuracy], label=name, color=colour, linestyle=dashes, marker="o")
    axis.set(xlabel="beam width", ylabel="right, share of held-out prompts", xscale="log")
    axis.set_xticks(widths, [str(width) for width in widths])
    axis.minorticks_off()
    axis.set_title(f"{accuracy[0]['n']} prompts", fontsize=10.5, color=INK, loc="left")
    tidy(axis)
    legend_below(axis)
    return write(drawn, path)


def _encoded(tokenizer: Any, prompts: list[Any], template: dict[str, Any]) -> Any:
    if isinstance(prompts[0], str):
        found = tokenizer(prompts, padding=True, return_tensors="pt")
    else:
        found = tokenizer.apply_chat_template(
            prompts,
            add_generation_prompt=True,
            tokenize=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
            **template,
        )
    found.pop("token_type_ids", None)
    refuse_empty([row.nonzero() for row in found["attention_mask"]])
    return found


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    """As in training: up to and with the first token that ends; a search fills short beams with that token."""
    end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: end + 1]


def _as(prompt: Any, text: str) -> Any:
    """A completion in the form of its prompt, as in training."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
