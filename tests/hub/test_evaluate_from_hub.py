"""Evaluating an adapter on the Hub: its rows are written as in training, by the record beside it."""

import json

import pytest
from chat import CHATML, byte_model, byte_tokenizer
from datasets import Dataset
from hub_server import Fault, Repo
from training import SETTINGS, lora_config

from echo_trainer import EchoSFTConfig, EchoSFTTrainer, evaluate_adapter

MARKED = {"answer_marker": "[A]", "prompt_marker": "[Q]"}
ROWS = [{"text": f"[Q]ask {i}[A]say {i}"} for i in range(8)]


@pytest.fixture
def repos(hub):
    """Two public adapters: with a record, and without."""
    hub.reset()
    files = {"adapter_config.json": b"{}", "echo_run.json": json.dumps({"rows": MARKED}).encode()}
    hub.repos = {
        "ada/recorded": Repo(False, dict(files)),
        "ada/bare": Repo(False, {"adapter_config.json": b"{}"}),
        "ada/broken": Repo(False, {**files, "echo_run.json": b"{"}),
        "bob/private": Repo(True, dict(files)),
    }
    return hub


def test_a_record_on_the_hub_is_read(repos, client):
    answer = client("row_options", "ada/recorded")
    assert {name: answer[name] for name in MARKED} == MARKED


def test_a_repository_without_a_record(repos, client):
    answer = client("row_options", "ada/bare")
    assert answer["answer_marker"] is None and "error" not in answer


@pytest.mark.parametrize("action", [401, 403, "drop"])
def test_what_is_no_missing_file_is_an_error(repos, client, action):
    """A record that was not seen is not one that is not there."""
    repos.repos[f"ada/faulty-{action}"] = repos.repos["ada/recorded"]
    repos.faults = [Fault("echo_run.json", action, times=50)]
    answer = client("row_options", f"ada/faulty-{action}")
    assert "error" in answer and answer["kind"] != "AttributeError", answer


@pytest.mark.parametrize(("name", "kind"), [("ada/none", "RepositoryNotFoundError"), ("ada/broken", "ValueError")])
def test_no_repository_and_no_record_that_can_be_read(repos, client, name, kind):
    assert client("row_options", name)["kind"] == kind


def test_offline(repos, client):
    """What is kept of a repository is all there is."""
    client("fetch", "ada/recorded", "echo_run.json")
    client("fetch", "ada/bare", "adapter_config.json")
    asked = len(repos.requests)
    assert client("row_options", "ada/recorded", offline=True)["answer_marker"] == "[A]"
    bare = client("row_options", "ada/bare", offline=True)
    assert bare["answer_marker"] is None and "HF_HUB_OFFLINE" in bare["log"]
    unknown = client("row_options", "ada/unknown", offline=True)
    assert "could not be asked" in unknown["error"] and unknown["kind"] == "ValueError"
    assert len(repos.requests) == asked


def test_figures_from_the_hub_are_those_of_the_folder(hub, client, tmp_path):
    hub.reset()
    base = tmp_path / "base"
    byte_model().save_pretrained(base), byte_tokenizer(CHATML).save_pretrained(base)
    trainer = EchoSFTTrainer(
        model=str(base),
        args=EchoSFTConfig(output_dir=str(tmp_path / "run"), **{**SETTINGS, "max_steps": 2}, **MARKED),
        train_dataset=Dataset.from_list(ROWS),
        peft_config=lora_config(),
    )
    trainer.train(), trainer.save_model()
    files = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()}
    hub.repos["ada/trained"] = Repo(False, files, {"adapter_model.safetensors"})
    data = tmp_path / "held-out.jsonl"
    data.write_text("\n".join(map(json.dumps, ROWS)))
    here = evaluate_adapter(tmp_path / "run", [str(data)], base=str(base), mode="nll", output=tmp_path / "a")
    there = client("evaluate", "ada/trained", data, base, tmp_path / "b")
    assert "error" not in there, there
    assert [each["value"] for each in there["results"]] == [each["value"] for each in here["results"]]
    assert hub.count("GET /ada/trained/resolve/main/echo_run.json") == 1
