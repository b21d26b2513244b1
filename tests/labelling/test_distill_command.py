"""`echo-trainer distill`: from a run on the disk to a taught adapter, stopped and gone on with, and every refusal."""

import json
import re
from pathlib import Path

import pytest
import torch
from models import lora_config, prompt_completion_rows, tiny_model, tiny_tokenizer
from peft import PeftModel
from safetensors.torch import load_file
from training import echo_trainer

from echo_trainer import cli
from echo_trainer.cli.distill import help_text

ROWS = prompt_completion_rows(16, seed=1)
PROMPTS = [{"prompt": row["prompt"]} for row in prompt_completion_rows(9, seed=8)]
SETTINGS = {
    "max_steps": 4, "learning_rate": 1e-3, "per_device_train_batch_size": 4, "use_cpu": True, "bf16": False,
    "max_new_tokens": 8, "label_batch_size": 4, "save_steps": 2, "seed": 3, "gradient_checkpointing": False,
}  # fmt: skip
TRAINING = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, a run with an echo and one without, labelled rows and prompts."""
    folder = tmp_path_factory.mktemp("distill")
    model = tiny_model()
    with torch.no_grad():  # it ends an answer now and then
        model.lm_head.weight[1] *= 2
    model.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    for name, form in (("run", {"echo_preset": "strong"}), ("lora", {"echo_p_start": 0.0, "echo_p_end": 0.0})):
        trainer = echo_trainer(
            folder / name, model=str(folder / "base"), rows=ROWS, max_steps=2, save_strategy="steps", save_steps=1,
            lora=lora_config(init_lora_weights=True), **form,
        )  # fmt: skip
        trainer.train()
        trainer.save_model()
    write(folder / "train.jsonl", ROWS)
    write(folder / "prompts.jsonl", PROMPTS)
    return folder


@pytest.fixture
def there(place, tmp_path, monkeypatch):
    """A new folder from which the things above are reached."""
    for name in ("base", "run", "lora", "train.jsonl", "prompts.jsonl"):
        (tmp_path / name).symlink_to(place / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def distill(*words, out="out", mixed=True):
    rows = ["--dataset_name", "train.jsonl", "--ratio", "1:3"] if mixed else ["--ratio", "0:1"]
    places = ["--prompts", "prompts.jsonl", "--output_dir", out]
    return cli.main(["distill", *words[:1], *places, *rows, *TRAINING, *words[1:]])


@pytest.mark.parametrize(("run", "teacher"), [
    ("run", "echo"), ("run/checkpoint-1", "plain"), ("lora", "plain"), ("run", "base"),
])  # fmt: skip
def test_from_a_run_to_a_taught_adapter(there, run, teacher, capsys):
    assert distill(run, "--teacher", teacher) == 0
    assert "of 9 prompts have an answer to train on" in capsys.readouterr().out
    record = json.loads(Path("out/echo_run.json").read_text())
    assert record["distillation"]["teacher"] == teacher and record["steps"]["done"] == 4
    assert record["rows"] == json.loads(Path(run.split("/")[0], "echo_run.json").read_text())["rows"]
    assert len(Path("out/labels.jsonl").read_text().splitlines()) == 10
    model = PeftModel.from_pretrained(tiny_model(), "out")
    assert model.active_adapter == "default"
    assert not any("echo" in name for name in load_file("out/adapter_model.safetensors"))
    assert cli.main(["evaluate", "out", "--tasks", "train.jsonl", "--mode", "nll", "--base", "base"]) == 0
    assert distill(run, "--teacher", teacher) == 2  # finished
    assert "overwrite_output_dir" in capsys.readouterr().err


def test_stopped_and_called_again(there):
    """Labels and training go on where they were: the same labels, and the adapter to the bit."""
    assert distill("run", out="whole") == 0
    assert distill("run", out="part") == 0
    whole = Path("whole/labels.jsonl").read_bytes()
    assert Path("part/labels.jsonl").read_bytes() == whole
    for path in Path("part").glob("*"):  # as a kill after the first checkpoint leaves it
        if path.name not in ("labels.jsonl", "distill.json", "checkpoint-2", "echo_run.json"):
            path.unlink() if path.is_file() else [each.unlink() for each in path.rglob("*") if each.is_file()]
    before = Path("part/checkpoint-2/adapter_model.safetensors").stat().st_mtime_ns
    assert distill("run", out="part") == 0
    assert Path("part/checkpoint-2/adapter_model.safetensors").stat().st_mtime_ns == before  # gone on with
    one, two = (load_file(f"{name}/adapter_model.safetensors") for name in ("whole", "part"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    Path("new").mkdir()
    Path("new/labels.jsonl").write_bytes(whole[: len(whole) // 2])
    assert distill("run", "--label_only", "true", out="new") == 0
    assert Path("new/labels.jsonl").read_bytes() == whole and len(list(Path("new").iterdir())) == 1


def test_taught_rows_alone_samples_and_a_fresh_adapter(there):
    words = ["--n_samples", "4", "--labels", "soft", "--start", "fresh", "--gradient_checkpointing", "true"]
    assert distill("run", *words, mixed=False) == 0
    record = json.loads(Path("out/echo_run.json").read_text())
    assert record["distillation"]["n_labelled"] == 0 and record["prompt_format"] is None
    assert record["data"]["n_train"] is None


def test_evaluated_on_a_split(there):
    (there / "data").mkdir()
    for split, rows in (("train", ROWS), ("test", ROWS[:5])):
        write(there / "data" / f"{split}.jsonl", rows)
    assert distill("run", "--dataset_name", "data", "--eval_strategy", "steps", "--eval_steps", "2") == 0
    record = json.loads(Path("out/echo_run.json").read_text())
    assert sum("eval_loss" in entry for entry in record["metrics"]) == 2 and record["data"]["n_eval"] == 5


def test_columns_and_templates(there):
    write(there / "prompts.jsonl.new", [{"question": row["prompt"], "answer": "w1"} for row in PROMPTS])
    (there / "prompts.jsonl").unlink()
    (there / "prompts.jsonl.new").rename(there / "prompts.jsonl")
    assert distill("run", "--prompt_column", "question", "--label_only", "true", mixed=False) == 0
    rows = [json.loads(line) for line in Path("out/labels.jsonl").read_text().splitlines()[1:]]
    assert {row["row"]["prompt"] for row in rows} == {row["prompt"] for row in PROMPTS}
    write(there / "prompts.jsonl", [{"instruction": row["prompt"]} for row in PROMPTS])
    assert distill("run", "--dataset_template", "alpaca", "--label_only", "true", out="other", mixed=False) == 0
    rows = [json.loads(line) for line in Path("other/labels.jsonl").read_text().splitlines()[1:]]
    assert all(row["row"]["prompt"].endswith("### Response:\n") for row in rows)


@pytest.mark.parametrize(("words", "message"), [
    (["distill"], "RUN, the folder of a run, is missing"),
    (["distill", "run"], "--prompts FILE, rows with `prompt` only, is missing"),
    (["distill", "run", "--prompts", "prompts.jsonl"], "No --output_dir"),
    (["distill", "run", "--prompts", "prompts.jsonl", "--output_dir", "out"], "mixes labelled rows in"),
    (["distill", "lora"], "neither a checkpoint with echo networks nor the folder of a run"),
    (["distill", "nowhere"], "neither a checkpoint with echo networks nor the folder of a run"),
    (["distill", "nowhere/at/all", "--teacher", "plain"], "There is no folder nowhere/at/all"),
    (["distill", "base", "--teacher", "plain"], "is a whole model"),
    (["distill", "run", "--output_dir", "run"], "is the folder of the run itself"),
    (["distill", "run", "--per_device_train_batch_size", "5"], "Write a multiple of 4"),
    (["distill", "run", "--prompts", "train.jsonl"], "has `completion`, so its answer is known"),
    (["distill", "run", "--prompts", "missing.jsonl"], "missing.jsonl"),
    (["distill", "run", "--prompt_column", "question"], "has no column 'question'"),
    (["distill", "run", "--dataset_train_split", "dev"], "has no split 'dev'"),
    (["distill", "run", "--eval_strategy", "steps"], "has no split 'test'"),
    (["distill", "run", "--min_confidence", "1.5"], "from 0 (keep every answer) to 1"),
    (["distill", "run", "--min_confidence", "1"], "can be trained on"),
    (["distill", "run", "--packing", "true"], "kept by counting rows"),
])  # fmt: skip
def test_what_cannot_work(there, words, message, capsys):
    complete = ["--prompts", "prompts.jsonl", "--output_dir", "out", "--dataset_name", "train.jsonl", "--ratio", "1:3"]
    if words[-1] not in ("distill", "out") and words != ["distill", "run"] and "No --output_dir" not in message:
        words = [*words[:2], *complete, *TRAINING, *words[2:]]
    assert cli.main(words) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not Path("out/adapter_model.safetensors").exists()


def test_help_is_a_screen_and_names_options_that_exist(capsys):
    assert cli.main(["distill", "--help"]) == 0
    shown = capsys.readouterr().out
    assert cli.main(["distill", "--help-all"]) == 0
    everything = capsys.readouterr().out
    assert len(shown.splitlines()) < 60
    names = re.findall(r"^  (--\w+)", shown, re.MULTILINE)
    assert len(names) > 30 and all(f"{name} " in everything for name in names)
    assert max(map(len, help_text(100).splitlines())) <= 120
