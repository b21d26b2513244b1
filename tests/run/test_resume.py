"""Resuming in less usual circumstances: what an attack on it found."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from models import lora_config, prompt_completion_rows, tiny_model, tiny_tokenizer
from paths import DATA
from peft import get_peft_model
from training import SETTINGS, adapter, assert_equal, echo_trainer, losses

from echo_trainer import EchoSFTConfig, EchoSFTTrainer
from echo_trainer.manifest import MANIFEST
from echo_trainer.run.checkpoint_files import REPLACED, bring_back, checkpoints, damage, publish

SAVING = {"save_strategy": "steps", "save_steps": 2}
OLD = DATA / "checkpoint-of-dc086ab"


def old_run(folder, **settings):
    """A trainer with the settings with which the old checkpoint was written."""
    lora = lora_config(init_lora_weights=True, r=1, target_modules=["q_proj", "v_proj"])
    settings = {"echo_p_start": 0.6, "echo_p_end": 0.6, "echo_bottleneck": 2, **settings}
    shutil.copytree(OLD, folder, dirs_exist_ok=True)
    return echo_trainer(folder, lora=lora, **settings)


def test_a_checkpoint_of_an_older_version_goes_on(tmp_path):
    trainer = old_run(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    then = json.loads((OLD / "losses.json").read_text())["losses"]
    assert losses(trainer)[:3] == then[:3]
    # Not bit for bit: rows have one padded column more than then. What was logged as the loss was the objective.
    objectives = [entry["echo/objective"] for entry in trainer.state.log_history if "echo/objective" in entry]
    assert objectives == pytest.approx(then[3:], rel=1e-6)


def test_a_checkpoint_of_an_older_version_is_refused_like_any_other(tmp_path):
    with pytest.raises(ValueError, match="bottleneck was 2, is 4"):
        old_run(tmp_path, echo_bottleneck=4).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_datasets_of_any_format_are_saved(tmp_path, form):
    rows = Dataset.from_list([{"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6]}] * 8).with_format(form)
    trainer = echo_trainer(tmp_path, rows=rows, max_steps=2, **SAVING)
    trainer.train()
    trainer.save_model()
    assert json.loads((tmp_path / "echo_run.json").read_text())["steps"]["done"] == 2


def test_a_card_that_cannot_be_written_does_not_cost_the_adapter(tmp_path, monkeypatch, caplog):
    trainer = echo_trainer(tmp_path, max_steps=1)
    trainer.train()
    monkeypatch.setattr("echo_trainer.run.save.write_run_folder", lambda *a, **k: 1 / 0)
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").exists() and "could not be written" in caplog.text


def best_settings(**more):
    return {
        "trainer_kwargs": {"eval_dataset": Dataset.from_list(prompt_completion_rows(8, seed=5))},
        "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 5e-2,
        "metric_for_best_model": "eval_entropy", "greater_is_better": True, **SAVING, **more,
    }  # fmt: skip


def test_the_best_checkpoint_survives_a_move_of_the_folder(tmp_path):
    whole = echo_trainer(tmp_path / "whole", max_steps=8, save_total_limit=1, **best_settings())
    whole.train()
    first = echo_trainer(tmp_path / "here", max_steps=8, save_total_limit=1, **best_settings())
    stop_after(first, 4)
    first.train()
    (tmp_path / "here").rename(tmp_path / "there")
    again = echo_trainer(tmp_path / "there", max_steps=8, save_total_limit=1, **best_settings())
    again.train(resume_from_checkpoint=True)
    assert Path(again.state.best_model_checkpoint).name == Path(whole.state.best_model_checkpoint).name
    assert_equal(adapter(again), adapter(whole))


def stop_after(trainer, step):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == step

    trainer.add_callback(Stop())


def test_a_damaged_best_checkpoint_is_not_loaded(tmp_path, caplog):
    trainer = echo_trainer(tmp_path, **best_settings())
    harmed = []

    def load_best():
        path = Path(trainer.state.best_model_checkpoint) / "adapter_model.safetensors"
        content = bytearray(path.read_bytes())
        content[-4:] = b"\xff\xff\xff\xff"  # a NaN
        path.write_bytes(content)
        harmed.append(adapter(trainer))
        type(trainer)._load_best_model(trainer)

    trainer._load_best_model = load_best
    trainer.train()
    assert "is damaged" in caplog.text
    assert_equal(adapter(trainer), harmed[0])


def test_replacing_a_checkpoint_never_loses_it(tmp_path, monkeypatch):
    echo_trainer(tmp_path, max_steps=2, **SAVING).train()
    final, staged = tmp_path / "checkpoint-2", tmp_path / ".unfinished" / "checkpoint-2"
    shutil.copytree(final, staged)
    rename = Path.rename

    def failing(self, target):
        if self == staged:
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no"):
        publish(staged, final)
    assert damage(final) is None
    monkeypatch.undo()

    final.rename(tmp_path / f"{REPLACED}checkpoint-2")  # killed between the two renames
    assert checkpoints(tmp_path) == []
    echo_trainer(tmp_path, max_steps=4, **SAVING).train(resume_from_checkpoint=True)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-2"]

    publish(shutil.copytree(final, staged), final)
    bring_back(tmp_path)
    assert damage(final) is None and not list(tmp_path.glob(f"{REPLACED}*"))


def test_a_run_that_had_done_its_last_step_does_no_other(tmp_path):
    settings = {"max_steps": 4, "lr_scheduler_type": "constant", **SAVING}
    whole = echo_trainer(tmp_path, **settings)
    whole.train()
    again = echo_trainer(tmp_path, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    assert_equal(adapter(again), adapter(whole))


CHANGES = [
    ({"lora_alpha": 80}, "lora_alpha was 8 and is 80"),
    ({"r": 8}, "r was 4 and is 8"),
    ({"lora_dropout": 0.3}, "lora_dropout was 0.0 and is 0.3"),
    ({"target_modules": ["q_proj", "v_proj"]}, "target_modules was"),
    ({"use_dora": True}, "use_dora was False and is True"),
]


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    echo_trainer(folder, max_steps=2, lora=changed(), **SAVING).train()
    return folder


def changed(**change):
    config = lora_config(init_lora_weights=True)
    for name, value in {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, **change}.items():
        setattr(config, name, set(value) if isinstance(value, list) else value)
    return config


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=[next(iter(change)) for change, _ in CHANGES])
def test_another_adapter_is_refused_by_name(two_steps, change, message):
    with pytest.raises(ValueError, match=message):
        echo_trainer(two_steps, lora=changed(**change)).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("rate", [1e-4, None])
def test_another_rate_of_the_echo_is_refused(tmp_path, rate):
    echo_trainer(tmp_path, max_steps=2, echo_learning_rate=1e-3, **SAVING).train()
    with pytest.raises(ValueError, match=r"echo_learning_rate=0\.001"):
        echo_trainer(tmp_path, max_steps=4, echo_learning_rate=rate).train(resume_from_checkpoint=True)


def test_another_learning_rate_is_announced(two_steps, tmp_path, caplog):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    echo_trainer(tmp_path, max_steps=2, lora=changed(), learning_rate=1e-5).train(resume_from_checkpoint=True)
    assert "the old one stays" in caplog.text and "It was 0.005 and is 1e-05." in caplog.text


def test_another_number_of_processes_is_announced(two_steps, tmp_path, caplog):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    manifest = tmp_path / "checkpoint-2" / MANIFEST
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "processes": 2}))
    echo_trainer(tmp_path, max_steps=2, lora=changed()).train(resume_from_checkpoint=True)
    assert "number of processes changed" in caplog.text and "It was 2 and is 1." in caplog.text


def test_a_list_with_fewer_facts_resumes(two_steps, tmp_path, caplog):
    """Another version may have kept fewer; what is not known is not compared."""
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoint-2" / MANIFEST
    facts = json.loads(path.read_text())
    for fact in ("learning_rate", "processes", "planned_steps", "rows", "base_values", "published_by"):
        del facts[fact]
    path.write_text(json.dumps(facts))
    echo_trainer(tmp_path, max_steps=4, lora=changed(), learning_rate=1e-5).train(resume_from_checkpoint=True)
    assert "Resuming from" not in caplog.text
    with pytest.raises(ValueError, match=r"global batch of 4 samples \(\? processes\)"):
        echo_trainer(tmp_path, lora=changed(), per_device_train_batch_size=2).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )


@pytest.mark.parametrize("harm", [{"files": {"optimizer.pt": {}}}, {"files": {"optimizer.pt": 3}}, {"adapter": None}])
def test_a_list_that_lacks_what_is_needed_is_damage(two_steps, tmp_path, harm):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoint-2" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | harm))
    assert damage(tmp_path / "checkpoint-2") == f"{MANIFEST} cannot be read"
    with pytest.raises(ValueError, match="all are damaged: checkpoint-2"):
        echo_trainer(tmp_path, lora=changed()).train(resume_from_checkpoint=True)


def test_an_edited_card_is_no_damage(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint-2" / "README.md").write_text("mine")
    assert damage(tmp_path / "checkpoint-2") is None


def test_two_trainers_on_one_model_each_train_their_own_echo(tmp_path):
    model = get_peft_model(tiny_model(), lora_config(init_lora_weights=True))
    first, second = (
        EchoSFTTrainer(
            model=model,
            args=EchoSFTConfig(output_dir=str(tmp_path / name), echo_p_end=1.0, echo_seed=seed, **SETTINGS),
            train_dataset=Dataset.from_list(prompt_completion_rows(40)),
            processing_class=tiny_tokenizer(),
        )
        for seed, name in enumerate("ab")
    )
    before = {name: p.detach().clone() for name, p in second.echo_networks.named_parameters()}
    start = {name: p.detach().clone() for name, p in first.echo_networks.named_parameters()}
    first.train()
    assert any(not torch.equal(p, start[name]) for name, p in first.echo_networks.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in second.echo_networks.named_parameters())


def test_an_interrupted_run_leaves_no_state_behind(tmp_path):
    trainer = echo_trainer(tmp_path, max_steps=4, logging_steps=4, echo_p_end=1.0)
    network, calls = next(iter(trainer.echo_networks.networks.values())), []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    handle = network.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    handle.remove()
    trainer.guard.nonfinite_in_a_row = 9
    trainer.train()
    assert trainer.guard.nonfinite_in_a_row == 0
    fresh = echo_trainer(tmp_path, max_steps=4, logging_steps=4, echo_p_end=1.0)
    fresh.train()
    tokens = [next(e["num_tokens"] for e in t.state.log_history if "num_tokens" in e) for t in (trainer, fresh)]
    assert tokens[0] == pytest.approx(tokens[1], rel=0.5)  # another order of the data, not twice as many steps


def test_a_finished_run_in_the_folder_is_said_before_it_is_replaced(tmp_path, caplog):
    first = echo_trainer(tmp_path, max_steps=2)
    first.train()
    first.save_model()
    first.train()  # its own run
    assert "holds a finished run" not in caplog.text
    echo_trainer(tmp_path, max_steps=2).train()
    assert caplog.text.count("holds a finished run: saving into it replaces its adapter") == 1
