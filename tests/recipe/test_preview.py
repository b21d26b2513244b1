"""`sft --dry-run`: what it says of a run is what the run is, and it leaves nothing behind."""

import json
import re
from pathlib import Path

import pytest
import torch
from models import lora_config, prompt_completion_rows, tiny_model, tiny_tokenizer
from training import echo_trainer

from echo_trainer import cli
from echo_trainer.recipe.arguments import parse
from echo_trainer.recipe.preview import preview


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    tiny_model().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in prompt_completion_rows(12)))
    return folder


def words(place, *more):
    options = {"model_name_or_path": place / "base", "dataset_name": place / "rows.jsonl", "output_dir": "out",
               "lora_r": 4, "lora_alpha": 8, "use_cpu": "true", "bf16": "false"}  # fmt: skip
    return [word for name, value in options.items() for word in (f"--{name}", str(value))] + list(more)


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--echo_preset", "strong", "--gradient_accumulation_steps", "2"],
        ["--echo_aggregation", "weighted", "--echo_bottleneck", "8", "--use_dora", "true"],
        ["--num_train_epochs", "2", "--per_device_train_batch_size", "3", "--dataloader_drop_last", "true"],
    ],
    ids=["default", "strong", "weighted", "epochs"],
)
def test_what_is_counted_is_what_the_trainer_has(place, tmp_path, monkeypatch, more):
    monkeypatch.chdir(tmp_path)
    arguments = parse(words(place, *more))
    found = preview(*arguments)
    _, config, adapter, _ = arguments
    lora = lora_config(init_lora_weights=True, use_dora=adapter.use_dora)
    same = ("echo_preset", "echo_aggregation", "echo_bottleneck", "gradient_accumulation_steps", "num_train_epochs",
            "per_device_train_batch_size", "dataloader_drop_last")  # fmt: skip
    settings = {"max_steps": -1, **{name: getattr(config, name) for name in same}}
    trainer = echo_trainer(tmp_path / "run", rows=prompt_completion_rows(12), lora=lora, **settings)
    assert (found.sources, found.targets, found.sites) == (
        trainer.echo.source_layers,
        sorted({site.layer for site in trainer.echo.sites}),
        len(trainer.echo.sites),
    )
    assert found.networks == sum(p.numel() for p in trainer.echo_networks.parameters())
    assert found.trainable == sum(p.numel() for n, p in trainer.model.named_parameters() if "lora_" in n)
    trainer.train()
    assert found.steps == trainer.state.max_steps
    first = trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"])
    assert (found.examples[0].prompt + found.examples[0].answer).replace(" ", "") == first.replace(" ", "")


def test_costs_are_those_of_the_passes(place, tmp_path, monkeypatch):
    """A full echo pass is a second plain pass; one over the answers is less; without an echo there is none."""
    monkeypatch.chdir(tmp_path)
    found = preview(*parse(words(place))).costs
    assert found["full"] == found["plain"] and found["suffix"].flops < found["plain"].flops
    assert set(preview(*parse(words(place, "--echo_pass", "full"))).costs) == {"plain", "full"}
    off = preview(*parse(words(place, "--echo_p_start", "0", "--echo_p_end", "0")))
    assert set(off.costs) == {"plain"} and off.sites == off.networks == 0 and off.proved is None


@pytest.mark.parametrize("spelling", ["--dry-run", "--dry_run"])
def test_the_command_writes_nothing_and_loads_no_weights(place, tmp_path, monkeypatch, capsys, spelling):
    monkeypatch.chdir(tmp_path)
    random = torch.random.get_rng_state()
    base = tmp_path / "base"
    base.mkdir()
    for path in (place / "base").iterdir():
        if path.suffix != ".safetensors":
            (base / path.name).write_bytes(path.read_bytes())
    arguments = [*words(place), "--model_name_or_path", str(base), "--max_steps", "8", spelling]
    assert cli.main(["sft", *arguments]) == 0
    shown = capsys.readouterr().out
    for part in ("dry run", "trainable parameters", "suffix, all routed", "about 8 of 8 rows", "Template check",
                 "Before the first step", "max_steps", "p 1 -> "):  # fmt: skip
        assert part in shown, part
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert torch.equal(random, torch.random.get_rng_state())


def test_what_a_run_would_refuse_is_refused(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    Path("out/echo_run.json").write_text("{}")
    Path("out/adapter_model.safetensors").touch()
    assert cli.main(["sft", *words(place), "--dry-run"]) == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert cli.main(["sft", *words(place), "--overwrite_output_dir", "true", "--dry-run"]) == 0
    assert Path("out/echo_run.json").is_file()
    assert cli.main(["sft", *words(place), "--output_dir", "x", "--max_length", "2", "--dry-run"]) == 2
    assert "Raise `max_length`" in capsys.readouterr().err


def test_lost_answers_and_layers_that_only_the_run_knows(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = preview(*parse(words(place, "--max_length", "10", "--lora_layers", "cka")))
    assert 0 < found.lost < 1 and re.search(r"CKA .* last \d of 5", " ".join(found.notes))
    assert found.options["max_length"] == 10 and "echo_gate" in found.options and "report_to" not in found.options


@pytest.mark.parametrize(("more", "said"), [((), True), (("--dataset_template", "chat"), False)], ids=["text", "chat"])
def test_rows_that_pass_by_the_chat_template_are_said(tmp_path, more, said):
    """A chat model is asked through its template; rows of two columns do not look like that."""
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    rows = [json.dumps({"q": f"w{i} w2", "a": "w3"}) for i in range(8)]
    (tmp_path / "faq.jsonl").write_text("\n".join(rows))
    found = preview(*parse([
        "--model_name_or_path", str(tmp_path / "base"), "--dataset_name", str(tmp_path / "faq.jsonl"),
        "--prompt_column", "q", "--completion_column", "a", "--output_dir", str(tmp_path / "out"), "--use_cpu", "true",
        "--learning_rate", "3e-4", *more,
    ]))  # fmt: skip
    assert any("has a chat template" in note for note in found.notes) == said
    assert found.rate == 3e-4
