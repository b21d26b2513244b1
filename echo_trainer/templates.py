"""Prompt templates: one function for training and for evaluation, so that the two never differ by a space.

The eight commonsense tasks of LLM-Adapters (BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC-e, ARC-c, OBQA) come as an
`instruction` and an `output` ("the correct answer is answer2"). OpenBookQA in its original columns is put into the
same words.
"""

from collections.abc import Callable
from typing import Any

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def instruction_and_answer(example: dict[str, Any]) -> tuple[str, str]:
    """
    Instruction and answer of one example.

    Args:
        example: a row of a dataset in the LLM-Adapters format (`instruction`, optional `input`, `output`) or of
            OpenBookQA (`question_stem`, `choices`, `answerKey`).

    Raises:
        ValueError: the row has the columns of neither.
    """
    if "instruction" in example and "output" in example:
        extra = example.get("input") or ""
        return example["instruction"] + (f"\n\n{extra}" if extra else ""), example["output"]
    if {"question_stem", "choices", "answerKey"} <= example.keys():
        return _multiple_choice(example["question_stem"], example["choices"], example["answerKey"])
    raise ValueError(
        f"A `dataset_template` turns the columns instruction and output (LLM-Adapters), or question_stem, choices and "
        f"answerKey (OpenBookQA), into a prompt and a completion; this dataset has {sorted(example)}. Leave "
        f"`dataset_template` out if it is in a format of TRL already (prompt and completion, or messages)."
    )


def alpaca(example: dict[str, Any]) -> dict[str, str]:
    """Plain text in the Alpaca template, for base models."""
    instruction, answer = instruction_and_answer(example)
    return {"prompt": ALPACA.format(instruction=instruction), "completion": answer}


def chat(example: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    """A user message and an assistant message, for models with a chat template."""
    instruction, answer = instruction_and_answer(example)
    return {
        "prompt": [{"role": "user", "content": instruction}],
        "completion": [{"role": "assistant", "content": answer}],
    }


TEMPLATES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"alpaca": alpaca, "chat": chat}


def _multiple_choice(question: str, choices: dict[str, list[str]], key: str) -> tuple[str, str]:
    options = " ".join(f"Answer{number}: {text}" for number, text in enumerate(choices["text"], start=1))
    names = "/".join(f"answer{number}" for number in range(1, len(choices["text"]) + 1))
    instruction = (
        f"Please choose the correct answer to the question: {question}\n\n{options}\n\nAnswer format: {names}"
    )
    return instruction, f"the correct answer is answer{choices['label'].index(key.strip()) + 1}"
