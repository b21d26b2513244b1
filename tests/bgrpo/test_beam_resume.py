"""A run that was stopped and resumed is the same run, bit for bit; also between two generations, in a later epoch."""

import shutil

import pytest
import torch
from beam_cases import G, beam_trainer
from models import lora_config
from trl.trainer.utils import RepeatSampler

from echo_trainer.bgrpo.resumption import BEAMS
from echo_trainer.compat.beams import OrderByEpoch

SETTINGS = {"max_steps": 11, "num_iterations": 2, "save_strategy": "steps", "save_steps": 1}
"""Three generations of four prompts an epoch, two steps on each: epochs begin at the steps 0, 6 and so on."""


def trainer(folder, **settings):
    lora = lora_config(init_lora_weights=True, lora_dropout=0.2)
    return beam_trainer(folder, lora=lora, disable_dropout=False, **{**SETTINGS, **settings})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = trainer(tmp_path_factory.mktemp("whole"))
    run.train()
    return run


@pytest.mark.parametrize("step", [2, 3, 9])
def test_resumed_run_is_the_same(whole, tmp_path, step):
    shutil.copytree(f"{whole.args.output_dir}/checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    for (name, value), (_, expected) in zip(
        resumed.model.named_parameters(), whole.model.named_parameters(), strict=True
    ):
        assert torch.equal(value, expected), name
    losses = [
        {entry["step"]: entry["loss"] for entry in run.state.log_history if "loss" in entry}
        for run in (resumed, whole)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 11
    kept = torch.load(tmp_path / f"checkpoint-{step}" / BEAMS.format(0), weights_only=True)
    assert resumed.resumption.seconds_before == kept["seconds"] > 0  # the card says what all parts have cost
    assert resumed.state.num_input_tokens_seen == whole.state.num_input_tokens_seen


def test_beams_that_are_used_up_are_not_kept(whole):
    sizes = [
        torch.load(f"{whole.args.output_dir}/checkpoint-{step}/{BEAMS.format(0)}", weights_only=True)["generated"]
        for step in (3, 4)
    ]
    assert len(sizes[0]) == 2 and sizes[1] is None


@pytest.mark.parametrize("changed", [{"num_iterations": 3}, {"num_generations": 2, "per_device_train_batch_size": 6}])
def test_other_beams_are_refused(whole, tmp_path, changed):
    with pytest.raises(ValueError, match="was made with"):
        trainer(tmp_path, **changed).train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-3")


def test_training_again_makes_new_beams(tmp_path):
    """The second call of `train` begins a run, whose first beams are those of the model as it is then."""
    judged = []
    run = beam_trainer(tmp_path, verifier=lambda *given: judged.append(given) or len(judged) % 2, max_steps=1)
    for calls in (1, 2, 3):
        run.train()
        assert len(judged) == calls * 4 * G and run.micro_steps == 2


def test_a_checkpoint_without_beams_is_refused(whole, tmp_path):
    folder = shutil.copytree(f"{whole.args.output_dir}/checkpoint-3", tmp_path / "checkpoint-3")
    (folder / BEAMS.format(0)).unlink()
    with pytest.raises(ValueError, match="has no beam_groups_0"):
        trainer(tmp_path).train(resume_from_checkpoint=str(folder))


def test_what_a_killed_run_left_half_written_is_passed_over(whole, tmp_path, caplog):
    """The state of the trainer is written last: without it there is no checkpoint, whatever else lies there."""
    run, last = whole.args.output_dir, whole.state.global_step
    shutil.copytree(f"{run}/checkpoint-3", tmp_path / "checkpoint-3")
    half = shutil.copytree(f"{run}/checkpoint-4", tmp_path / "checkpoint-4")
    (half / "trainer_state.json").unlink()
    with pytest.raises(
        ValueError, match=r"checkpoint-4 is damaged: trainer_state.json is missing. Continue from .*-3"
    ):
        trainer(tmp_path).train(resume_from_checkpoint=str(half))
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint="last")
    assert "The checkpoint checkpoint-4" in caplog.text and resumed.state.global_step == last
    for (name, value), (_, expected) in zip(
        resumed.model.named_parameters(), whole.model.named_parameters(), strict=True
    ):
        assert torch.equal(value, expected), name
    shutil.rmtree(tmp_path / "checkpoint-3")
    for folder in tmp_path.glob("checkpoint-*"):
        (folder / "trainer_state.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="No valid checkpoint found in output directory"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


def test_epochs_have_the_order_that_trl_gives_them():
    def sampler():
        return RepeatSampler(list(range(9)), mini_repeat_count=2, batch_size=3, repeat_count=2, seed=4)

    ongoing = sampler()
    for epoch in range(3):
        alone = OrderByEpoch(sampler())  # as in a run that is resumed in this epoch
        alone.set_epoch(epoch)
        assert list(alone) == list(ongoing) and len(alone) == len(ongoing)
