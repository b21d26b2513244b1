"""Time, tokens and mean loss of a run that was stopped and resumed are those of the whole run."""

import json

import pytest
from training import echo_trainer
from transformers import TrainerCallback

from echo_trainer.manifest import read_manifest
from echo_trainer.report.render import mean_loss

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def record_of(folder):
    return json.loads((folder / "echo_run.json").read_text())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"echo_p_start": 0.0, "echo_p_end": 0.0},
        {"logging_steps": 4},
        {"logging_steps": 3, "packing": True, "max_length": 64},
    ],
    ids=["echo", "plain", "a checkpoint between two logs", "packed"],
)  # fmt: skip
def test_a_resumed_run_has_cost_what_an_uninterrupted_one_costs(tmp_path, settings):
    whole = echo_trainer(tmp_path / "whole", **SAVING, **settings)
    result = whole.train()
    whole.save_model()
    first = echo_trainer(tmp_path / "twice", **SAVING, **settings)
    first.add_callback(Stop(2))
    first.train()
    spent = read_manifest(tmp_path / "twice" / "checkpoint-2")["spent"]
    for stop in (4, None):  # twice, the second time in the process that had already trained
        again = echo_trainer(tmp_path / "twice", **SAVING, **settings)
        if stop is not None:
            again.add_callback(Stop(stop))
        again.train(resume_from_checkpoint=True)
    again.save_model()
    expected, found = record_of(tmp_path / "whole"), record_of(tmp_path / "twice")
    assert found["compute"]["tokens"] == expected["compute"]["tokens"] > 0
    if "echo_p_start" not in settings:  # without an echo the log is TRL's, which counts from the resume
        counted = [
            [entry["num_tokens"] for entry in run["metrics"] if "num_tokens" in entry] for run in (expected, found)
        ]
        assert counted[0][-1] == counted[1][-1]
    (runtime,) = (entry["train_runtime"] for entry in found["metrics"] if "train_runtime" in entry)
    assert 0 < spent["seconds"] < found["compute"]["seconds"] - runtime
    assert (expected["steps"]["continued_from"], found["steps"]["continued_from"]) == (0, 4)
    if whole.args.logging_steps == 1:  # else steps between a log and the checkpoint are in no loss
        mean = mean_loss(found["metrics"], 4)
        assert mean == pytest.approx(result.training_loss, rel=1e-3)  # logs are rounded
        assert mean != pytest.approx(found["metrics"][-1]["train_loss"], rel=2e-3)


def test_the_mean_loss_of_no_further_step_and_of_none():
    history = [{"loss": 2.0, "step": 1}, {"loss": 1.0, "step": 4}, {"train_loss": 0.0, "step": 4}]
    assert mean_loss(history, 4) == (2.0 + 3 * 1.0) / 4
    assert mean_loss(history[:2], 0) is None


def test_training_again_in_the_same_process_counts_from_the_checkpoint(tmp_path):
    trainer = echo_trainer(tmp_path, echo_p_start=0.0, echo_p_end=0.0, **SAVING)
    trainer.train()
    once = trainer.spent.tokens
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trainer.spent.tokens == once > 0
