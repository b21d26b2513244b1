"""Prompt templates: one function for training and for evaluation, so that the two never differ by a space.

The eight commonsense tasks of LLM-Adapters (BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC-e, ARC-c, OBQA) come as an
`instruction` and an `output` ("the correct answer is answer2"). OpenBookQA in its original columns is put into the
same words. Other instruction data is known by its columns.
"""

from collections.abc import Callable
from typing import Any

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)

# Columns of an instruction, of more text to it (or None), and of the answer; the first pair that a row has is taken.
COLUMNS = (
    ("instruction", "input", "output"),  # LLM-Adapters, Alpaca
    ("instruction", "context", "response"),  # Dolly, Magicoder
    ("query", None, "response"),  # MetaMathQA
    ("question", None, "answer"),  # GSM8K
)


def instruction_and_answer(example: dict[str, Any]) -> tuple[str, str]:
    """
    Instruction and answer of one example.

    Args:
        example: a row of a dataset in the LLM-Adapters format (`instruction`, optional `input`, `output`), with
            `instruction`, optional `context` and `response` (Dolly, Magicoder), `query` and `response` (MetaMathQA),
            `question` and `answer` (GSM8K), or of OpenBookQA (`question_stem`, `choices`, `answerKey`).

    Raises:
        ValueError: the row has the columns of none of them.
    """
    for instruction, more, answer in COLUMNS:
        if isinstance(example.get(instruction), str) and isinstance(example.get(answer), str):
            extra = (example.get(more) if more is not None else None) or ""
            return example[instruction] + (f"\n\n{extra}" if extra else ""), example[answer]
    if {"question_stem", "choices", "answerKey"} <= example.keys():
        return multiple_choice(example["question_stem"], example["choices"], example["answerKey"])
    raise ValueError(
        f"A template (alpaca, chat) turns the columns instruction and output (LLM-Adapters), instruction and "
        f"response, query and response, question and answer (GSM8K), or question_stem, choices and answerKey "
        f"(OpenBookQA) into a prompt and a completion; this row has {sorted(example)}. Leave the template out "
        f"(`dataset_template` of a recipe, `--template` of `echo-trainer evaluate`) if the rows are in a format of "
        f"TRL already (prompt and completion, or messages)."
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


def multiple_choice(question: str, choices: dict[str, list[str]], key: str) -> tuple[str, str]:
    """
    Instruction and answer of a question with lettered choices (ARC, OpenBookQA), in the words of LLM-Adapters.

    Args:
        question: the question.
        choices: `text` and `label` of every choice.
        key: label of the right one.

    Raises:
        ValueError: `key` is none of the labels.
    """
    options = " ".join(f"Answer{number}: {text}" for number, text in enumerate(choices["text"], start=1))
    names = "/".join(f"answer{number}" for number in range(1, len(choices["text"]) + 1))
    instruction = (
        f"Please choose the correct answer to the question: {question}\n\n{options}\n\nAnswer format: {names}"
    )
    return instruction, f"the correct answer is answer{list(choices['label']).index(key.strip()) + 1}"
