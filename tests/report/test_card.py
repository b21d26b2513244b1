"""The model card: complete, true to the record, without gaps and local paths; its commands work as they stand."""

import copy
import json
import os
import re
import subprocess
import sys

import pytest
import torch
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from models import lora_config, prompt_completion_rows, tiny_model
from paths import EXAMPLE_CARD
from training import echo_trainer

from echo_trainer.evaluation.generation import greedy_answers
from echo_trainer.report.folder import update_record
from echo_trainer.report.record import _data_revision, _git, _license, hyperparameters
from echo_trainer.report.render import render_card

GAPS = re.compile(
    r"\bNone\b|\bPATH|\bTODO\b|\{\{|\{%|\bnan\b|undefined|"  # what a template leaves
    r"(?<![\w.:/~-])/(?:[\w.+-]+/)+[\w.+-]+|"  # absolute paths; not those of addresses
    r"\b[A-Z]:\\"
)
EVALUATION = [
    {"task": "boolq", "dataset": "google/boolq", "split": "validation", "metric": "accuracy", "value": 0.7125,
     "n": 3270, "interval": [0.6967, 0.7277], "seeds": [0, 1, 2]},
    {"task": "stories", "dataset": "my own stories!", "split": None, "metric": "exact match", "value": 0.5, "n": 10,
     "interval": None, "seeds": None},
]  # fmt: skip


@pytest.fixture(scope="module")
def record():
    """That of the example, as if its base were on the Hub."""
    found = json.loads((EXAMPLE_CARD / "echo_run.json").read_text())
    return {**found, "base_model": "org/base-7b", "base_is_quickstart": False, "base_revision": "0" * 40}


def change(record, **changes):
    found = copy.deepcopy(record)
    for path, value in changes.items():
        *above, last = path.split("__")
        inner = found
        for name in above:
            inner = inner[name]
        inner[last] = value
    return found


def block(card, language):
    return re.findall(rf"```{language}\n(.*?)```", card, re.DOTALL)


def test_example_is_what_the_template_makes():
    """If this fails: python model_cards/make_example.py"""
    card = (EXAMPLE_CARD / "README.md").read_text()
    assert render_card(json.loads((EXAMPLE_CARD / "echo_run.json").read_text())) == card
    assert not GAPS.search(card), GAPS.search(card)
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", card):
        assert (EXAMPLE_CARD / picture).read_bytes().startswith(b"\x89PNG")
    assert "0 to 1" not in card and re.search(r"\| two hops .* \| 200 \|", card)


def test_metadata_reads_back(record):
    full = change(record, evaluation=EVALUATION, license="apache-2.0", data__dataset="org/data", repo_id="ada/mine")
    text = render_card(full)
    data = ModelCard(text).data  # the Hub's own reader
    assert (data.library_name, data.pipeline_tag, data.license) == ("peft", "text-generation", "apache-2.0")
    assert data.base_model == "org/base-7b" and data.datasets == ["org/data"]
    assert yaml.safe_load(text.split("---")[1])["base_model_relation"] == "adapter"
    assert {"lora", "echo-lora", "trl", "sft", "base_model:adapter:org/base-7b"} == set(data.tags)
    results = {result.task_name: result for result in data.eval_results}
    assert results["boolq"].metric_value == 0.7125 and results["boolq"].metric_type == "accuracy"
    assert results["boolq"].dataset_type == "google/boolq" and results["boolq"].dataset_split == "validation"
    assert results["stories"].metric_type == "exact_match" and data.model_name == "mine"


@pytest.mark.parametrize("changes", [
    {}, {"base_model": None}, {"base_model": None, "base_is_quickstart": True}, {"repo_id": "ada/mine"},
    {"evaluation": EVALUATION}, {"evaluation": None}, {"example": None}, {"example__exact": False},
    {"prompt_format": None}, {"example": None, "prompt_format": None},
    {"example": None, "prompt_format__exact": False}, {"prompt_format__answer": None}, {"saved": None},
    {"saved__method": "DoRA", "adapter__use_dora": True}, {"saved__rank": 600}, {"git": None},
    {"git": {"commit": "abc", "changed": True}}, {"echo__enabled": False, "echo__source_layers": None},
    {"adapter": None, "saved": None}, {"curves": []}, {"metrics": []}, {"steps__epoch": None},
    {"compute": {"seconds": None, "tokens": None, "device_name": "H200", "peak_memory_bytes": 7e9}},
    {"data__n_train": None, "data__n_eval": {"a": 1}, "data__fingerprint": None, "data__max_length": None},
    {"saved__engines": {"vllm": "serves", "tgi": "silently-wrong", "sglang": "refuses"}},
    {"echo__echo_learning_rate": 1e-3, "echo__echo_seed": 0}, {"hyperparameters__data_seed": None},
    {"adapter__layers_to_transform": [1, 2]}, {"license": None, "data__dataset": None},
])  # fmt: skip
def test_no_gaps(record, changes):
    text = render_card(change(record, **changes))
    assert not GAPS.search(text), GAPS.search(text)
    assert "\n\n\n" not in text and re.search(r"^## Limitations$", text, re.MULTILINE)
    for table in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):  # every row has the columns of its head
        lines = table.splitlines()
        assert set(lines[1]) <= set("|-") and len({line.replace("\\|", "").count("|") for line in lines}) == 1, table


def test_the_echo_is_described_as_it_was(record):
    text = render_card(record)
    assert "at answer positions only" in text and "distillation between them" in text
    text = render_card(change(record, echo__echo_positions="predicting", echo__echo_kd_weight=0.0))
    assert "and the last prompt token" in text and "positions only" not in text
    assert "The loss is the cross-entropy of both passes. The" in text


def test_results_are_said_or_missing(record):
    assert "Not evaluated on held-out tasks." in render_card(change(record, evaluation=None))
    assert "model-index" not in render_card(change(record, evaluation=None))
    text = render_card(change(record, evaluation=EVALUATION))
    assert "| boolq | google/boolq | validation | accuracy | 0.7125 | 0.6967 to 0.7277 | 3,270 | 3: 0, 1, 2 |" in text
    assert "| stories | my own stories! | - | exact match | 0.5 | not measured | 10 | one run |" in text
    metrics = [*record["metrics"], {"eval_loss": 1.25, "eval_runtime": 3.0, "step": 100}]
    assert "| loss | 1.25 |" in render_card(change(record, metrics=metrics, data__n_eval=50))
    assert "(50 examples)" in render_card(change(record, metrics=metrics, data__n_eval=50))


@pytest.mark.parametrize(("rank", "flag"), [(1, 1), (12, 16), (16, 16), (17, 32), (300, 320), (512, 512)])
def test_max_lora_rank(record, rank, flag):
    text = render_card(change(record, saved__rank=rank))
    assert f"vllm serve org/base-7b --enable-lora --max-lora-rank {flag} --lora-modules" in text
    assert f"--model-path org/base-7b --enable-lora --max-lora-rank {rank} --lora-paths" in text


def test_rank_that_no_engine_serves(record):
    text = render_card(change(record, saved__rank=600))
    assert "vllm serve" not in text and "export --merged" in text


def test_dora_says_that_no_engine_serves_it(record):
    text = render_card(change(record, saved__method="DoRA", adapter__use_dora=True, repo_id="ada/mine"))
    assert "No serving engine serves a DoRA adapter as it is today" in text and "# DoRA adapter for" in text
    assert "hf download ada/mine" in text and "echo-trainer export --merged adapter merged --base org/base-7b" in text
    assert "--enable-lora" not in text and "dora" in ModelCard(text).data.tags


@pytest.mark.parametrize("prompt", ["say \"hi\"\n'there' $HOME `x` \\n", "```python\nx\n```", "été 猫 <|user|>\t|"])
def test_any_prompt_keeps_its_letters(record, prompt):
    text = render_card(change(record, example={"prompt": prompt, "answer": " yes", "exact": True, "added": ""}))
    shown = text.partition("The first training example")[2]
    fence = re.search(r"Prompt:\n\n(`+)text\n(.*?)\n\1\n", shown, re.DOTALL)
    assert fence[2] == prompt
    (code,) = re.findall(r"^prompt = (.*)$", text, re.MULTILINE)
    assert eval(code) == prompt
    (request,) = re.findall(r"<<'JSON'\n(.*)\nJSON\n", text)
    assert json.loads(request)["prompt"] == prompt
    for commands in block(text, "bash"):
        subprocess.run(["bash", "-n"], input=commands, text=True, check=True)


def test_commands_of_the_card_work(tmp_path):
    """The Python block of a fresh run's card, in a process that cannot import echo_trainer."""
    base, out = tmp_path / "base", tmp_path / "out"
    tiny_model().save_pretrained(base)
    # A random adapter, hardly trained: it writes something, while a trained one of this size ends at once.
    trainer = echo_trainer(out, lora=lora_config(r=4), learning_rate=1e-6, card_prompt="example")
    trainer.train()
    trainer.save_model()
    text = (out / "README.md").read_text()
    assert not GAPS.search(text), GAPS.search(text)
    assert "`BASE` is the folder" in text and "(trained rank 4, saved rank 16)" in text
    (code,) = block(text, "python")
    code = "import sys; sys.modules['echo_trainer'] = None\n" + code
    done = subprocess.run([sys.executable, "-c", code], cwd=out, env=os.environ | {"BASE": str(base)}, text=True,
                          capture_output=True, check=True)  # fmt: skip
    row = prompt_completion_rows(40)[0]
    assert f"Prompt:\n\n```text\n{row['prompt']}\n```" in text
    answer = greedy_answers(trainer.model, trainer.processing_class, [row["prompt"]], max_new_tokens=64)[0]
    assert done.stdout.strip() == answer.strip() != ""

    # Results are kept for this adapter and forgotten for another; a card edited by hand is left alone.
    assert update_record(out, evaluation=EVALUATION) and "| boolq |" in (out / "README.md").read_text()
    trainer.save_model()
    assert "| boolq |" in (out / "README.md").read_text()
    with torch.no_grad():
        next(p for n, p in trainer.model.named_parameters() if "lora_B" in n).add_(1)
    trainer.save_model()
    assert "| boolq |" not in (out / "README.md").read_text()
    (out / "README.md").write_text("mine")
    assert not update_record(out, evaluation=EVALUATION)
    assert (out / "README.md").read_text() == "mine"
    assert json.loads((out / "echo_run.json").read_text())["evaluation"] == EVALUATION
    assert not update_record(base)


def test_the_best_model_is_described_and_not_the_last(tmp_path):
    trainer = echo_trainer(
        tmp_path, trainer_kwargs={"eval_dataset": Dataset.from_list(prompt_completion_rows(8, seed=5))}, max_steps=6,
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=True, learning_rate=1e-2,
    )  # fmt: skip
    trainer.train()  # the highest loss, which is the first
    trainer.save_model()
    by_step = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert max(by_step, key=by_step.get) == 2
    card = (tmp_path / "README.md").read_text()
    assert "6 optimizer steps" in card and "that of step 2, the best by `eval_loss`" in card
    assert "at step 2:" in card and f"| loss | {by_step[2]:.4g} |" in card and f"{by_step[6]:.4g}" not in card
    assert f"{by_step[2]:.4g}" != f"{by_step[6]:.4g}"


def test_license_and_data_revision(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: llama3\n---\n# base\n")
    assert _license(None, str(tmp_path)) == "llama3"
    assert _license(None, str(tmp_path / "nothing")) is None

    class Data:
        class info:
            download_checksums = {f"hf://datasets/org/name@{'a' * 40}/train.parquet": {}}

    assert _data_revision(Data) == "a" * 40
    Data.info.download_checksums |= {f"hf://datasets/org/name@{'b' * 40}/x": {}}
    assert _data_revision(Data) is None and _data_revision([]) is None


@pytest.mark.parametrize("script", ["cli/__main__.py", "bin/echo-trainer"])
def test_the_commit_is_that_of_the_users_project(tmp_path, monkeypatch, script):
    """And not that of the package, where `python -m` and console scripts lie."""
    (tmp_path / "package" / script).parent.mkdir(parents=True)
    (tmp_path / "package" / script).touch()
    commits = {}
    for name in ("package", "project"):
        (tmp_path / name).mkdir(exist_ok=True)
        git = ["git", "-C", str(tmp_path / name), "-c", "user.name=ada", "-c", "user.email=ada@localhost"]
        subprocess.run([*git, "init", "-q"], check=True)
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", name], check=True)
        commits[name] = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "package" / script)])
    monkeypatch.chdir(tmp_path / "project")
    _git.cache_clear()
    assert _git()["commit"] == commits["project"] != commits["package"]
    _git.cache_clear()


def test_hyperparameters_name_no_place_and_no_token(tmp_path):
    from echo_trainer import EchoSFTConfig

    config = EchoSFTConfig(
        str(tmp_path), hub_token="hf_secret", run_name="mine", hub_model_id="ada/x", adam_beta2=0.95, seed=3,
        logging_steps=7, use_cpu=True, bf16=False, report_to="none",
    )  # fmt: skip
    found = hyperparameters(config)
    assert found["adam_beta2"] == 0.95 and found["seed"] == 3 and found["learning_rate"] == config.learning_rate
    text = json.dumps(found)
    for word in ("hf_secret", str(tmp_path), "mine", "ada/x"):
        assert word not in text
