"""From a file or folder of one's own to prompts and completions."""

import json
import logging

import pytest
from datasets import Dataset
from models import prompt_completion_rows, tiny_model, tiny_tokenizer

from echo_trainer import cli
from echo_trainer.evaluation.tasks import load_tasks
from echo_trainer.recipe.arguments import parse
from echo_trainer.recipe.data import load_data
from echo_trainer.templates import ALPACA

ROWS = [{"question": f"w{i} w3 ?", "answer": f"w{i % 5} w7"} for i in range(12)]
COLUMNS = ("--prompt_column", "question", "--completion_column", "answer")


def write(folder, name, rows=ROWS):
    rows = Dataset.from_list(rows)
    writer = {"csv": rows.to_csv, "jsonl": rows.to_json, "parquet": rows.to_parquet}.get(name.split(".")[-1])
    if writer is None:
        rows.to_csv(folder / name, sep="\t")
    else:
        writer(folder / name)
    return str(folder / name)


def load(*arguments):
    data, _, _, mixture = parse(["--use_cpu", "true", *arguments])
    return load_data(data, mixture)


@pytest.mark.parametrize("name", ["faq.csv", "faq.tsv", "faq.jsonl", "faq.parquet"])
def test_a_file_is_the_training_split(tmp_path, name):
    rows = load("--dataset_name", write(tmp_path, name), *COLUMNS)
    assert list(rows) == ["train"] and rows["train"].column_names == ["prompt", "completion"]
    assert rows["train"][2] == {"prompt": "w2 w3 ?", "completion": " w2 w7"}


def test_a_folder_of_files_is_split_by_name(tmp_path):
    write(tmp_path, "train.csv"), write(tmp_path, "test.csv", ROWS[:3])
    rows = load("--dataset_name", str(tmp_path), *COLUMNS)
    assert {split: len(part) for split, part in rows.items()} == {"train": 12, "test": 3}


@pytest.mark.parametrize(("template", "prompt", "completion"), [
    ("chat", [{"role": "user", "content": "w2 w3 ?"}], [{"role": "assistant", "content": "w2 w7"}]),
    ("alpaca", ALPACA.format(instruction="w2 w3 ?"), "w2 w7"),
])  # fmt: skip
def test_a_template_takes_the_columns_that_are_named(tmp_path, template, prompt, completion):
    rows = [{"q": row["question"], "a": row["answer"]} for row in ROWS]
    named = ("--prompt_column", "q", "--completion_column", "a", "--dataset_template", template)
    found = load("--dataset_name", write(tmp_path, "faq.jsonl", rows), *named)["train"]
    assert found[2] == {"prompt": prompt, "completion": completion}
    options = {"template": template, "columns": ("q", "a"), "tokenizer": tiny_tokenizer()}
    (task,) = load_tasks([str(tmp_path / "faq.jsonl")], **options)
    (again,) = load_tasks([write(tmp_path, "known.jsonl")], **{**options, "columns": None})
    assert [(item.prompt, item.completion) for item in task.items] == [(i.prompt, i.completion) for i in again.items]


@pytest.mark.parametrize("empty", [{"q": "w1", "a": ""}, {"q": None, "a": "w1"}], ids=["answer", "question"])
def test_a_template_does_not_hide_what_is_empty(tmp_path, empty):
    rows = [{"q": "w1", "a": "w2"}, empty]
    with pytest.raises(ValueError, match="1 of 2 rows"):
        load("--dataset_name", write(tmp_path, "x.jsonl", rows), "--prompt_column", "q", "--completion_column", "a",
             "--dataset_template", "chat")  # fmt: skip


def test_white_space_of_the_data_is_kept(tmp_path):
    rows = [{"q": "w1\n", "a": "w2"}, {"q": "w1", "a": "\tw2"}]
    path = write(tmp_path, "x.jsonl", rows)
    found = load("--dataset_name", path, "--prompt_column", "q", "--completion_column", "a")["train"]
    assert found[0]["completion"] == "w2" and found[1]["completion"] == "\tw2"


@pytest.mark.parametrize(("rows", "arguments", "words"), [
    (ROWS, (), ["columns answer, question", "dataset_template: alpaca", "prompt_column: question"]),
    ([{"a": "x", "b": "y"}], (), ["columns a, b", "prompt_column: ...", "completion_column: ..."]),
    ([{"prompt": "x", "answer": "y"}], (), ["columns answer, prompt", "none of them is known"]),
    (ROWS, ("--prompt_column", "question"), ["`prompt_column` is given alone", "completion_column"]),
    (ROWS, ("--prompt_column", "question", "--completion_column", "anwser"), ["no column 'anwser'", "answer"]),
    ([*ROWS, {"question": "w1", "answer": ""}], COLUMNS, ["1 of 13 rows", "'answer'", "rows 12"]),
    ([*ROWS, {"question": " ", "answer": "w1"}], COLUMNS, ["1 of 13 rows", "'question'"]),
    ([{"question": "w1", "answer": None}, *ROWS], ("--dataset_template", "chat"), ["1 of 13 rows", "rows 0"]),
    ([{"question": "w1", "answer": None}] * 9 + ROWS, COLUMNS, ["9 of 21 rows", "rows 0, 1, 2, 3, 4, ..."]),
])  # fmt: skip
def test_what_cannot_be_trained_on_is_refused_in_words(tmp_path, rows, arguments, words):
    with pytest.raises(ValueError) as stop:
        load("--dataset_name", write(tmp_path, "faq.jsonl", rows), *arguments)
    assert all(word in str(stop.value) for word in words), str(stop.value)


@pytest.mark.parametrize("name", ["nowhere.csv", "no/where.JSONL"])
def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(name):
    with pytest.raises(FileNotFoundError, match="there is none at"):
        load("--dataset_name", name)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`echo-trainer sft` on a CSV file with a tiny base, nothing said about the device's number format."""
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("base")
    tiny_tokenizer().save_pretrained("base")
    write(tmp_path, "faq.csv")

    def run_(*more):
        return cli.main([
            "sft", "--model_name_or_path", "base", "--dataset_name", "faq.csv", *COLUMNS, "--output_dir", "out",
            "--max_steps", "2", "--save_steps", "1", "--report_to", "none", *more,
        ])  # fmt: skip

    return run_


def test_a_csv_file_is_trained_on_and_a_finished_run_is_not_replaced(run, tmp_path, capsys):
    assert run() == 0
    assert "Next: `echo-trainer check out`" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "echo_run.json").read_text())
    assert record["hyperparameters"]["bf16"] is False  # on a CPU
    kept = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert run("--seed", "3") == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert kept == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert run("--seed", "3", "--max_steps", "1", "--overwrite_output_dir", "true") == 0
    assert json.loads((tmp_path / "out" / "echo_run.json").read_text())["hyperparameters"]["seed"] == 3
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_base_that_is_not_there_is_named(run, capsys):
    assert run("--model_name_or_path", "nowhere/base") == 2
    said = capsys.readouterr().err
    assert "`model_name_or_path` is 'nowhere/base'" in said and "There is no folder of that name here" in said
    assert run("--model_name_or_path", "nowhere/base", "--dry-run") == 2
    assert "`model_name_or_path` is 'nowhere/base'" in capsys.readouterr().err


def test_a_resumed_run_says_where_it_goes_on(run, capsys):
    assert run("--max_steps", "1") == 0
    assert "Going on from" not in capsys.readouterr().out
    assert run("--resume_from_checkpoint", "true") == 0
    assert "Going on from step 1 of 2." in capsys.readouterr().out


@pytest.mark.parametrize("kept", ["checkpoint-1", "echo_run.json", "both"])
def test_a_run_that_was_stopped_is_not_called_finished(run, tmp_path, capsys, kept):
    """Of a killed run its checkpoints are there, and the record that came with them; the adapter is not."""
    out = tmp_path / "out"
    if kept != "echo_run.json":
        (out / "checkpoint-1").mkdir(parents=True)
    if kept != "checkpoint-1":
        out.mkdir(exist_ok=True)
        (out / "echo_run.json").write_text("{}")
    assert run() == 2
    said = capsys.readouterr().err
    assert "a run that was stopped before it ended" in said and "`resume_from_checkpoint: true` to go on" in said
    assert run("--max_steps", "1", "--overwrite_output_dir", "true") == 0


def test_messages_without_a_chat_template_are_refused_in_words(run, tmp_path, capsys):
    bare = tiny_tokenizer()
    bare.chat_template = None
    bare.save_pretrained("base")
    for file in (tmp_path / "base").glob("chat_template*"):
        file.unlink()
    assert run("--dataset_template", "chat") == 2
    assert "no chat template to write them as text" in capsys.readouterr().err


def test_a_test_split_that_nobody_uses_is_said(run, tmp_path, caplog):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", "train.csv"), write(tmp_path / "data", "test.csv")
    with caplog.at_level(logging.WARNING):
        assert run("--dataset_name", "data", "--max_steps", "1") == 0
    assert "split 'test', which is not used" in caplog.text


def test_rows_in_a_format_of_trl_are_taken_as_they_are(tmp_path):
    rows = prompt_completion_rows(4)
    assert load("--dataset_name", write(tmp_path, "x.jsonl", rows))["train"].to_list() == rows
