"""
Multiple-choice questions as plain questions and answers: the answer is an option in words, not its number.

    python recipes/ablation/questions.py LLM_ADAPTERS/social_i_qa-test.json --out DATA

Reads files of LLM-Adapters whose questions have numbered options (ARC, OpenBookQA, SIQA), shuffles their rows with a
fixed seed, and writes `test.jsonl` and `train.jsonl` with `prompt`, `completion` and `options`. The prompt is the
question alone: what an adapter learns is to answer it, and the options are compared by their likelihood.
"""

import argparse
import json
import random
import re
from pathlib import Path

QUESTION = re.compile(r"^Please choose the correct answer to the question: (.*?)\s+Answer1: ", re.DOTALL)
OPTION = re.compile(r"Answer(\d): (.*?)(?=\s+Answer\d: |\s*\n\nAnswer format:)", re.DOTALL)


def row_of(given: dict[str, str]) -> dict | None:
    """
    A question in words.

    Args:
        given: a row of LLM-Adapters.

    Returns:
        `prompt`, `completion` and `options`; None where two options are the same.

    Raises:
        ValueError: the row is no question with numbered options.
    """
    question = QUESTION.match(given["instruction"])
    listed = given["instruction"][question.end(1) :] if question else ""
    options = {number: text.strip() for number, text in OPTION.findall(listed)}
    if question is None or given["answer"].removeprefix("answer") not in options:
        raise ValueError(f"This is no question with numbered options: {given!r}")
    if len(set(options.values())) < len(options):
        return None
    return {
        "prompt": f"Question: {question[1].strip()}\nAnswer:",
        "completion": f" {options[given['answer'].removeprefix('answer')]}",
        "options": list(options.values()),
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="files of LLM-Adapters")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and test.jsonl")
    parser.add_argument("--test", type=int, default=500, help="rows of test.jsonl")
    args = parser.parse_args()
    rows = [
        row
        for file in args.files
        for given in json.loads(file.read_text(encoding="utf-8"))
        if (row := row_of(given)) is not None
    ]
    random.Random(0).shuffle(rows)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, part in (("test", rows[: args.test]), ("train", rows[args.test :])):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in part]
        (args.out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
        print(f"{name}.jsonl: {len(part):,} rows")


if __name__ == "__main__":
    main()
