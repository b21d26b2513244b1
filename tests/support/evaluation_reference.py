"""Evaluation written straight down: one text at a time, no padding, no cache, no batches. Slow, and easy to check."""

import re

import torch


@torch.no_grad()
def log_likelihood(model, tokenizer, prompt, completion, special_tokens=True):
    """Sum of the log-probabilities of the completion's tokens after the prompt."""
    prompt_ids = tokenizer(prompt, add_special_tokens=special_tokens)["input_ids"]
    ids = tokenizer(prompt + completion, add_special_tokens=special_tokens)["input_ids"]
    start = 0
    while start < min(len(prompt_ids), len(ids)) and prompt_ids[start] == ids[start]:
        start += 1
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    total = 0.0
    for place in range(start, len(ids)):
        total += float(torch.log_softmax(logits[place - 1].double(), dim=0)[ids[place]])
    return total


@torch.no_grad()
def greedy_text(model, tokenizer, prompt, max_new_tokens):
    """What the model writes: the most likely token, again and again, the whole text read anew each time."""
    ids = tokenizer(prompt)["input_ids"]
    written = []
    while len(written) < max_new_tokens:
        logits = model(input_ids=torch.tensor([ids + written]), use_cache=False).logits[0, -1]
        written.append(int(logits.argmax()))
        if written[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(written, skip_special_tokens=True)


def first_choice(task, text):
    """The answer extraction of LLM-Adapters."""
    patterns = {
        "boolq": r"true|false",
        "piqa": r"solution1|solution2",
        "winogrande": r"option1|option2",
        "hellaswag": r"ending1|ending2|ending3|ending4",
    }
    found = re.findall(patterns.get(task, r"answer1|answer2|answer3|answer4|answer5"), text.strip())
    return found[0] if found else ""
