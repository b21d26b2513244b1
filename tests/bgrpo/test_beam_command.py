"""`echo-trainer bgrpo` on a tiny model and a verifier in a file."""

import json
from pathlib import Path

import pytest
from beam_cases import prompt_rows, tiny_base
from models import adapted, tiny_model, tiny_tokenizer

from echo_trainer import check_adapter, cli

CHECKS = """
from pathlib import Path

def right(prompt, completion, row):
    return (len(completion) + row["number"]) % 2 == 0

def breaks_after_training(prompt, completion, row):
    if Path("out/checkpoint-1").is_dir():
        raise KeyError("late")
    return right(prompt, completion, row)
"""
OPTIONS = [
    *("--model_name_or_path", "base", "--dataset_name", "data", "--output_dir", "out", "--report_to", "none"),
    *("--use_cpu", "--bf16", "False", "--num_generations", "3", "--per_device_train_batch_size", "6", "--lora_r", "4"),
    *("--gradient_accumulation_steps", "2", "--num_iterations", "1", "--max_completion_length", "4"),
    *("--max_steps", "1", "--beam_eval_widths", "1", "3"),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_base("base")
    Path("data").mkdir()
    for split, count in (("train", 12), ("test", 4)):
        Path("data", f"{split}.jsonl").write_text("\n".join(map(json.dumps, prompt_rows(count))))
    Path("checks.py").write_text(CHECKS)
    return tmp_path


def command(*words):
    return cli.main(["bgrpo", *OPTIONS, *words])


def test_a_verifier_that_fails_after_training_does_not_cost_the_adapter(folder):
    with pytest.raises(KeyError, match="late"):
        command("--verifier", "checks.py:breaks_after_training")
    assert Path("out/adapter_model.safetensors").is_file()
    check_adapter("out", base="base")
    assert json.loads(Path("out/echo_run.json").read_text())["bgrpo"]["accuracy"] is None


def test_card_and_record_have_what_was_measured_after(folder):
    assert command("--verifier", "checks.py:right") == 0
    record = json.loads(Path("out/echo_run.json").read_text())["bgrpo"]
    assert [row["width"] for row in record["accuracy"]] == [1, 3]
    assert "| 1 (greedy) |" in Path("out/README.md").read_text() and Path("out/assets/beams.png").is_file()


@pytest.mark.parametrize(
    ("template", "options", "ignored"),
    [
        ("w33 {{ messages[0]['content'] }}", ["--lora_r", "64", "--lora_alpha", "8"], "lora_r=64, lora_alpha=8"),
        ("{{ messages[0]['content'] }} w9", ["--use_dora"], "lora_r=4, use_dora=True"),
        (None, [], "lora_r=4"),
    ],
)
def test_an_adapter_brings_its_tokenizer_and_its_form(folder, caplog, template, options, ignored):
    base = adapted(tiny_model())
    base.save_pretrained("sft")
    if template is not None:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        tokenizer.save_pretrained("sft")
    options = [*options, "--portable_adapter", "False", "--beam_eval_rows", "0"]
    assert command("--verifier", "checks.py:right", "--adapter_name_or_path", "sft", *options) == 0
    written = Path("out/chat_template.jinja").read_text()
    assert written == (template or tiny_tokenizer().chat_template)
    assert json.loads(Path("out/adapter_config.json").read_text())["r"] == 4
    assert f"so {ignored} will do nothing" in caplog.text
