"""Measure what the embedded base answers to the kinds of question it was pretrained on, on stories it never saw.

OMP_NUM_THREADS=1 python recipes/quickstart/measure_base.py      # prints the table that is in README.md
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from pathlib import Path

import torch
from make_data import PACKAGE_DATA, ask, base_question, make_story
from transformers import AutoModelForCausalLM, AutoTokenizer

from echo_trainer.evaluation.generation import greedy_answers

KINDS = ("where is", "what does", "which thing", "who has", "what colour", "who is")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=PACKAGE_DATA / "base")
    parser.add_argument("--stories", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=12345, help="of the stories")
    args = parser.parse_args()

    rng = random.Random(args.seed)
    prompts, references, kinds = [], [], []
    for _ in range(args.stories):
        story = make_story(rng)
        question, answer = base_question(rng, story)
        prompts.append(story.text + ask(question))
        references.append(answer)
        kinds.append(next(kind for kind in KINDS if question.startswith(kind)))
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    answers = greedy_answers(model, tokenizer, prompts, max_new_tokens=12)
    right: dict[str, list[bool]] = defaultdict(list)
    for kind, answer, reference in zip(kinds, answers, references, strict=True):
        # pretraining asks one question after another, so the base goes on with the next one
        right[kind].append(answer.split(" Question:")[0].strip() == reference)
    for kind in KINDS:
        print(f"{kind:12} {sum(right[kind]) / len(right[kind]):.2f}  of {len(right[kind])}")


if __name__ == "__main__":
    main()
