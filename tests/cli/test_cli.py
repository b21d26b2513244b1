"""The command line end to end: recipes, local folders, layer selection, check."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
from models import prompt_completion_rows, tiny_model, tiny_tokenizer

from echo_trainer import EchoSFTConfig, cli
from echo_trainer.cli.short_help import short_help
from echo_trainer.recipe.arguments import parse
from echo_trainer.recipe.find import available_recipes, recipe_path
from echo_trainer.templates import alpaca, chat


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a base model, a dataset folder and a recipe."""
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "data").mkdir()
    for split, n in (("train", 24), ("test", 8)):
        lines = [json.dumps(row) for row in prompt_completion_rows(n)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(lines))
    (tmp_path / "recipe.yaml").write_text(
        "model_name_or_path: base\ndataset_name: data\noutput_dir: out\nmax_steps: 2\nuse_cpu: true\nbf16: false\n"
        "report_to: none\nlora_r: 4\nlearning_rate: 1.0e-3\nper_device_train_batch_size: 4\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_sft_from_a_recipe_and_check(workplace, capsys):
    assert cli.main(["sft", "--config", "recipe.yaml", "--echo_p_end", "1.0", "--echo_source_layers", "-1", "-2"]) == 0
    record = json.loads((workplace / "out" / "echo_run.json").read_text())
    assert record["echo"]["echo_p_end"] == 1.0
    assert record["echo"]["source_layers"] == [3, 4]
    assert cli.main(["check", "out", "--base", "base"]) == 0
    assert "vllm" in capsys.readouterr().out


@pytest.mark.parametrize("layers", ["cka", "last"])
def test_selected_layers(workplace, layers):
    arguments = ["--lora_layers", layers, "--echo_source_layers", "cka", "--echo_target_layers", "cka"]
    assert cli.main(["sft", "--config=recipe.yaml", "--portable_adapter", "false", *arguments]) == 0
    config = json.loads((workplace / "out" / "adapter_config.json").read_text())
    assert len(config["layers_to_transform"]) == 2  # half of five layers
    record = json.loads((workplace / "out" / "echo_run.json").read_text())["echo"]
    assert set(record["target_layers"]) <= set(config["layers_to_transform"])
    assert max(record["target_layers"]) < min(record["source_layers"])


def test_adapter_on_selected_layers_is_servable(workplace):
    assert cli.main(["sft", "--config", "recipe.yaml", "--lora_layers", "cka", "--echo_target_layers", "cka"]) == 0
    config = json.loads((workplace / "out" / "adapter_config.json").read_text())
    assert not config.get("layers_to_transform")  # the portable form: every layer, zeros where it was not trained
    assert cli.main(["check", "out", "--base", "base"]) == 0


def test_select_layers(workplace, capsys):
    assert cli.main(["select-layers", "--config", "recipe.yaml", "--n_samples", "12", "--n_bootstrap", "20"]) == 0
    selection = json.loads((workplace / "out" / "layer_selection.json").read_text())
    assert len(selection["layers"]) == 2
    assert (workplace / "out" / "layer_selection.png").read_bytes().startswith(b"\x89PNG")
    assert "lora_layers: cka" in capsys.readouterr().out


def test_every_recipe_parses():
    assert "smollm2-135m/openbookqa" in available_recipes()
    for name in (name for name in available_recipes() if not name.startswith(("ablation/", "polynomials/"))):
        data, config, adapter, _ = parse(["--config", name, "--use_cpu", "true"])  # bfloat16 needs it without a GPU
        assert data.dataset_name
        assert adapter.model_name_or_path
        assert recipe_path(name).read_text().startswith("# ")  # says what it needs and what to expect
        assert config.output_dir.startswith("runs/")


def test_templates_know_both_forms_of_openbookqa():
    ours = {
        "instruction": "Please choose the correct answer to the question: Q?\n\nAnswer1: a Answer2: b\n\n"
        "Answer format: answer1/answer2",
        "input": "",
        "output": "the correct answer is answer2",
    }
    original = {"question_stem": "Q?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
    assert alpaca(ours) == alpaca(original)
    assert chat(ours) == chat(original)
    with pytest.raises(ValueError, match="dataset_template"):
        alpaca({"text": "x"})


def test_help_of_every_command(capsys):
    assert cli.main(["--help"]) == 0
    overview = capsys.readouterr().out
    for command in ("quickstart", "bench", "select-layers", "check", "export"):
        assert f"  {command} " in overview
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert stop.value.code == 0
        assert len(capsys.readouterr().out) > 200


def test_help_of_sft_is_a_screen_and_names_options_that_exist(capsys):
    assert cli.main(["sft", "--help"]) == 0
    shown = capsys.readouterr().out
    assert cli.main(["sft", "--help-all"]) == 0
    everything = capsys.readouterr().out
    assert len(shown.splitlines()) < 75 < len(everything.splitlines())
    names = re.findall(r"^  (--\w+)", shown, re.MULTILINE)
    assert len(names) > 40 and all(f"{name} " in everything for name in names)
    assert all(f"--{f.name}" in names for f in dataclasses.fields(EchoSFTConfig) if f.name.startswith("echo_"))
    assert max(map(len, short_help(100).splitlines())) <= 120


@pytest.mark.parametrize("command", [
    ["sft", "--config", "nowhere"],
    ["sft", "--config", "broken.yaml"],
    ["select-layers", "--config", "nowhere"],
    ["ablate", "nowhere", "--output", "out"],
    ["ablate", "broken.yaml", "--output", "out"],
    ["trian"],
])  # fmt: skip
def test_wrong_names_are_said_before_torch_is_loaded(tmp_path, command):
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    code = f"import sys; from echo_trainer import cli; print(cli.main({command}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]
    assert command[-1] in done.stderr or "nowhere" in done.stderr or "broken.yaml" in done.stderr
    assert not (tmp_path / "out").exists()
