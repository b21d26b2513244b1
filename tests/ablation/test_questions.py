"""The script of `upper.sh`: multiple-choice questions of LLM-Adapters as questions and answers in words."""

import json
import subprocess
import sys

from paths import ROOT

from echo_trainer.evaluation.tasks import prompt_completion_task

SCRIPT = ROOT / "recipes" / "ablation" / "questions.py"


def asked(question, options, answer):
    listed = " ".join(f"Answer{number}: {option}" for number, option in enumerate(options, 1))
    names = "/".join(f"answer{number}" for number in range(1, len(options) + 1))
    instruction = f"Please choose the correct answer to the question: {question}\n\n{listed}\n\nAnswer format: {names}"
    return {"instruction": instruction, "input": "", "output": f"the correct answer is {answer}", "answer": answer}


def converted(tmp_path, rows, *options):
    (tmp_path / "given.json").write_text(json.dumps(rows))
    command = [sys.executable, str(SCRIPT), str(tmp_path / "given.json"), "--out", str(tmp_path / "out"), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_answer_is_an_option_in_words(tmp_path):
    rows = [
        asked(f"What is {i}? It is Answer4: no.", [f"it is {i}", "a lie: answer", "nothing"], "answer1")
        for i in range(9)
    ]
    rows.append(asked("Twice the same?", ["yes", "yes", "no"], "answer3"))
    assert converted(tmp_path, rows, "--test", "4").returncode == 0
    written = {
        name: [json.loads(row) for row in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("test", "train")
    }
    assert [len(rows) for rows in written.values()] == [4, 5]  # one has two options that are the same
    every = [row for rows in written.values() for row in rows]
    assert len({row["prompt"] for row in every}) == 9
    for row in every:
        number = row["prompt"].removeprefix("Question: What is ")[0]
        assert row["completion"] == f" it is {number}" and row["options"] == [
            f"it is {number}",
            "a lie: answer",
            "nothing",
        ]
    assert prompt_completion_task("words", written["test"]).items[0].options


def test_a_row_that_is_no_such_question_is_shown(tmp_path):
    done = converted(tmp_path, [{"instruction": "Is it so? Answer format: true/false", "answer": "true"}])
    assert done.returncode != 0 and "no question with numbered options" in done.stderr and "Is it so?" in done.stderr
