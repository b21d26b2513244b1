"""A preset fills what is not set, and nothing else; `paper` is what the defaults have always been."""

import json

import pytest
import torch
from models import lora_config
from training import adapter, all_parameters, assert_equal, echo_trainer, losses, trainable

from echo_trainer import EchoSFTConfig
from echo_trainer.options import PRESETS
from echo_trainer.recipe.arguments import arguments_of, parse

PAPER = {
    "echo_source_layers": None, "echo_target_layers": None, "echo_p_end": 0.2, "echo_gate": "sigmoid",
    "echo_scale": 0.1, "echo_detach": True, "echo_loss": "sum",
}  # fmt: skip
STRONG = {
    "echo_source_layers": "above", "echo_target_layers": "lowest", "echo_p_end": 1.0, "echo_gate": "none",
    "echo_scale": 1.0, "echo_detach": False, "echo_loss": "mean",
}  # fmt: skip
UPPER = {"target_modules": ["q_proj", "v_proj", "down_proj"], "layers_to_transform": [2, 3, 4],
         "layers_pattern": "layers", "init_lora_weights": True}  # fmt: skip


def config(tmp_path, **settings):
    return EchoSFTConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


def values(args):
    return {name: getattr(args, name) for name in PAPER}


def test_presets(tmp_path):
    assert values(config(tmp_path)) == values(config(tmp_path, echo_preset="paper")) == PAPER
    assert values(config(tmp_path, echo_preset="strong")) == STRONG
    assert {name for preset in PRESETS.values() for name in preset} == {*PAPER}


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_set_stays(tmp_path, preset, name):
    other = {"paper": STRONG, "strong": {**PAPER, "echo_source_layers": "depth", "echo_target_layers": "depth"}}[
        preset
    ]
    expected = {"paper": PAPER, "strong": STRONG}[preset]
    args = config(tmp_path, echo_preset=preset, **{name: other[name]})
    assert values(args) == {**expected, name: other[name]}


def test_from_the_command_line_and_a_recipe(tmp_path):
    words = [
        "--echo_preset",
        "strong",
        "--echo_detach",
        "true",
        "--echo_source_layers",
        "depth",
        "--echo_scale",
        "0.5",
    ]
    _, args, *_ = parse(["--output_dir", str(tmp_path), "--use_cpu", "true", *words])
    assert values(args) == {**STRONG, "echo_detach": True, "echo_source_layers": "depth", "echo_scale": 0.5}
    recipe = {"output_dir": str(tmp_path), "use_cpu": True, "echo_preset": "strong", "echo_gate": "sigmoid"}
    assert values(arguments_of(recipe)[1]) == {**STRONG, "echo_gate": "sigmoid"}


def test_paper_written_out_is_the_default(tmp_path):
    """Bit for bit, one by one, with an adapter on all layers."""
    default = echo_trainer(tmp_path / "a")
    written = echo_trainer(
        tmp_path / "b", echo_preset="strong", **{**PAPER, "echo_source_layers": [4], "echo_target_layers": [1]}
    )
    for trainer in (default, written):
        trainer.train()
    assert losses(default) == losses(written)
    assert_equal(trainable(default), trainable(written))


def test_strong_on_the_upper_layers(tmp_path):
    """Every parameter of the echo moves, nothing frozen does, the gate is gone, and resuming ends in the same bits."""
    settings = {
        "echo_preset": "strong", "lora": lora_config(**UPPER), "max_steps": 6, "save_strategy": "steps",
        "save_steps": 3, "gradient_checkpointing": True,
    }  # fmt: skip
    whole = echo_trainer(tmp_path / "whole", **settings)
    assert whole.echo.source_layers == [3] and {site.layer for site in whole.echo.sites} == {2}
    before = all_parameters(whole)
    assert not any("gate" in name for name in before if "echo" in name)
    whole.train()
    for name, parameter in all_parameters(whole).items():
        assert (not torch.equal(parameter, before[name])) == parameter.requires_grad, name
    entries = [entry for entry in whole.state.log_history if "echo/ce_echo" in entry]
    assert entries and not any("echo/gate" in entry for entry in entries)
    assert all(entry["echo/routed"] == 1 for entry in entries)
    resumed = echo_trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_equal(trainable(whole), trainable(resumed))
    whole.save_model()
    record = json.loads((tmp_path / "whole" / "echo_run.json").read_text())["echo"]
    assert record["echo_preset"] == "strong" and record["echo_loss"] == "mean"
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "no gate, scale from 1.0" in card and "each routed sample counts once" in card


def test_an_echo_of_zero_in_the_mean_is_the_run_without_echo(tmp_path):
    """P2 stays zero at a rate of next to nothing: the adapter of a run with the echo off, up to rounding."""
    settings = {"optim": "sgd", "max_grad_norm": 0.0}  # P2 has a gradient, and clipping would count it
    off = echo_trainer(tmp_path / "off", echo_p_start=0.0, echo_p_end=0.0, **settings)
    mean = echo_trainer(tmp_path / "mean", echo_preset="strong", echo_learning_rate=1e-30, **settings)
    for trainer in (off, mean):
        trainer.train()
    torch.testing.assert_close(losses(off), losses(mean), rtol=1e-5, atol=0)
    for name, value in adapter(off).items():
        torch.testing.assert_close(adapter(mean)[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"echo_gate": "none"}, "gate was 'sigmoid', is 'none'"),
        ({"echo_detach": False}, "detach was True, is False"),
        ({"echo_loss": "mean"}, "loss was 'sum', is 'mean'"),
    ],
)
def test_resuming_with_another_form_of_the_echo_is_refused(tmp_path, settings, message):
    echo_trainer(tmp_path / "a", save_strategy="steps", save_steps=2, max_steps=2).train()
    with pytest.raises(ValueError, match=message):
        echo_trainer(tmp_path / "b", **settings).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
