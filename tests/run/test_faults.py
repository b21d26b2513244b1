"""Faults are injected and nothing is lost: damaged checkpoints, full disks, NaN, lack of memory, kills."""

import io
import json
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from models import lora_config, prompt_completion_rows, tiny_model
from paths import SUPPORT
from poison import poison_a_micro_batch
from training import adapter, assert_equal, echo_trainer, losses
from transformers import TrainerCallback

from echo_trainer.manifest import MANIFEST
from echo_trainer.run.checkpoint_files import DELETED, STAGING, checkpoints, damage, last_whole_checkpoint, rotate
from echo_trainer.run.final_save import NonFiniteAdapterError
from echo_trainer.run.guard import MAX_IN_A_ROW, NonFiniteLossError
from echo_trainer.run.scaler import MAX_SKIPPED_IN_A_ROW

pytestmark = pytest.mark.slow

SAVING = {"save_strategy": "steps", "save_steps": 2}


def test_ten_kills():
    script = SUPPORT / "kill_runs.py"
    done = subprocess.run(
        [sys.executable, str(script), "--runs", "10", "--seed", "1"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 of 10 killed runs" in done.stdout


# Checkpoints


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 6 steps with checkpoints at 2, 4 and 6, and its trainer."""
    folder = tmp_path_factory.mktemp("finished")
    trainer = echo_trainer(folder, **SAVING)
    trainer.train()
    return folder, trainer


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, to be damaged."""
    subprocess.run(["cp", "-r", f"{finished[0]}/.", str(tmp_path)], check=True)
    return tmp_path


def test_checkpoints_are_whole_and_leave_nothing_behind(finished):
    folder, _ = finished
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-6", "checkpoint-4", "checkpoint-2"]
    assert all(damage(path) is None for path in checkpoints(folder))
    assert not list(folder.glob(f"{STAGING}*"))
    listed = json.loads((folder / "checkpoint-4" / MANIFEST).read_text())["files"]
    there = {p.relative_to(folder / "checkpoint-4").as_posix() for p in (folder / "checkpoint-4").rglob("*")}
    assert set(listed) == there - {MANIFEST, "README.md"}


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = [
    ("optimizer.pt", cut, "bytes and had"),
    ("adapter_model.safetensors", flip, "another content"),
    ("echo_networks.safetensors", Path.unlink, "is missing"),
    ("trainer_state.json", flip, "another content"),
    ("rng_state.pth", flip, "another content"),
    (MANIFEST, cut, "cannot be read"),
]


@pytest.mark.parametrize(("name", "harm", "message"), DAMAGES, ids=[f"{h.__name__} {n}" for n, h, _ in DAMAGES])
def test_a_damaged_checkpoint_is_recognised(copied, name, harm, message):
    if harm is cut and name == MANIFEST:
        (copied / "checkpoint-6" / name).write_text("{")
    else:
        harm(copied / "checkpoint-6" / name)
    assert message in damage(copied / "checkpoint-6")
    found, broken = last_whole_checkpoint(copied)
    assert found == copied / "checkpoint-4" and list(broken) == ["checkpoint-6"]


def test_the_previous_checkpoint_is_used_and_that_is_said(copied, finished, caplog):
    cut(copied / "checkpoint-6" / "optimizer.pt")
    again = echo_trainer(copied, **SAVING)
    again.train(resume_from_checkpoint=True)
    assert "checkpoint-6" in caplog.text and "damaged" in caplog.text and "checkpoint-4" in caplog.text
    assert_equal(adapter(again), adapter(finished[1]))
    assert damage(copied / "checkpoint-6") is None  # written again


def test_a_damaged_checkpoint_that_was_named_is_refused(copied):
    cut(copied / "checkpoint-6" / "optimizer.pt")
    before = sorted(os.listdir(copied))
    with pytest.raises(ValueError, match=r"damaged.*Continue from .*checkpoint-4"):
        echo_trainer(copied).train(resume_from_checkpoint=str(copied / "checkpoint-6"))
    assert sorted(os.listdir(copied)) == before


def test_all_checkpoints_damaged(copied):
    for checkpoint in checkpoints(copied):
        cut(checkpoint / "scheduler.pt")
    with pytest.raises(ValueError, match="all are damaged: checkpoint-6, checkpoint-4, checkpoint-2"):
        echo_trainer(copied).train(resume_from_checkpoint=True)


def test_another_model_is_refused(copied):
    with pytest.raises(ValueError, match="another base model"):
        echo_trainer(copied, model=tiny_model(num_hidden_layers=6)).train(resume_from_checkpoint=True)


def test_other_weights_of_the_base_are_announced(copied, caplog):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    echo_trainer(copied, model=model).train(resume_from_checkpoint=True)
    assert "other weights or another dtype" in caplog.text


def test_another_global_batch_is_refused_and_the_same_in_other_parts_is_not(copied):
    with pytest.raises(ValueError, match="global batch of 4 samples"):
        echo_trainer(copied, gradient_accumulation_steps=2).train(resume_from_checkpoint=True)
    trainer = echo_trainer(copied, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    trainer.train(resume_from_checkpoint=str(copied / "checkpoint-4"))
    assert trainer.state.global_step == 6


def test_more_steps_and_other_data_are_announced(copied, caplog):
    echo_trainer(copied, max_steps=8, rows=prompt_completion_rows(36)).train(resume_from_checkpoint=True)
    assert "It was 6 and is 8." in caplog.text and "It was 40 and is 36." in caplog.text


def test_a_checkpoint_of_another_trainer(copied, caplog):
    (copied / "checkpoint-6" / MANIFEST).unlink()
    echo_trainer(copied, max_steps=6).train(resume_from_checkpoint=True)
    assert "not saved by EchoSFTTrainer" in caplog.text


def test_limit_and_best_model(tmp_path):
    trainer = echo_trainer(
        tmp_path,
        trainer_kwargs={"eval_dataset": Dataset.from_list(prompt_completion_rows(8, seed=5))},
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, save_total_limit=2,
        load_best_model_at_end=True, metric_for_best_model="eval_loss",
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path and damage(best) is None
    assert len(checkpoints(tmp_path)) == 2 and best in checkpoints(tmp_path)
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert STAGING not in json.dumps(state) and state["best_model_checkpoint"] == str(best)


def test_a_deletion_that_is_killed_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    """And nothing whole is deleted for it later."""
    begin = echo_trainer(tmp_path, max_steps=4, save_total_limit=2, **SAVING)
    begin.train()

    def killed(folder, **options):
        if not folder.name.startswith(DELETED):
            return shutil.rmtree(folder, **options)
        (folder / "adapter_model.safetensors").unlink()
        raise KeyboardInterrupt

    again = echo_trainer(tmp_path, max_steps=6, save_total_limit=2, **SAVING)
    with monkeypatch.context() as patch:
        patch.setattr("echo_trainer.run.checkpoint_files.shutil", SimpleNamespace(rmtree=killed))
        with pytest.raises(KeyboardInterrupt):
            again.train(resume_from_checkpoint=True)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-4"]
    assert not any(damage(path) for path in checkpoints(tmp_path)) and list(tmp_path.glob(f"{DELETED}*"))
    echo_trainer(tmp_path, max_steps=8, save_total_limit=2, **SAVING).train(resume_from_checkpoint=True)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-8", "checkpoint-6"]
    assert not list(tmp_path.glob(".*"))


def test_the_oldest_checkpoints_are_deleted(copied):
    """By the time they were saved at; never the one just saved or the best, even if its step is early."""
    for name in ("checkpoint-2", "checkpoint-4", "checkpoint-6"):
        os.utime(copied / name / "trainer_state.json", (0, 0))  # a copy: times say nothing
    (copied / "checkpoint-9").mkdir()  # what an older version left of a deletion
    rotate(copied, None, [])
    assert len(checkpoints(copied)) == 4
    rotate(copied, 3, [copied / "checkpoint-2"])
    assert [path.name for path in checkpoints(copied)] == ["checkpoint-6", "checkpoint-4", "checkpoint-2"]
    rotate(copied, 2, [str(copied / "checkpoint-2"), None])
    assert [path.name for path in checkpoints(copied)] == ["checkpoint-6", "checkpoint-2"]
    manifest = json.loads((copied / "checkpoint-2" / MANIFEST).read_text())
    (copied / "checkpoint-2" / MANIFEST).write_text(json.dumps(manifest | {"saved_at": manifest["saved_at"] + 1e6}))
    rotate(copied, 1, [])  # a run that was begun again at step 1
    assert [path.name for path in checkpoints(copied)] == ["checkpoint-2"]


# A full disk


@contextmanager
def no_file_above(bound):
    """A file system that takes no file above a bound. Progress bars may be going to a file, too."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        resource.setrlimit(resource.RLIMIT_FSIZE, (bound, old[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("bound", [0, 2_000, 30_000])
def test_a_full_disk_at_a_checkpoint(tmp_path, bound):
    trainer = echo_trainer(tmp_path, max_steps=2, **SAVING)
    trainer.train()
    again = echo_trainer(tmp_path, max_steps=6, **SAVING)
    with no_file_above(bound), pytest.raises(OSError, match=r"disk is full.*last whole checkpoint is .*checkpoint-2"):
        again.train(resume_from_checkpoint=True)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]
    assert damage(tmp_path / "checkpoint-2") is None and not list(tmp_path.glob(f"{STAGING}*"))


def test_a_full_disk_at_the_final_save_leaves_the_old_adapter(tmp_path):
    trainer = echo_trainer(tmp_path, max_steps=2)
    trainer.train()
    trainer.save_model()
    old = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    trainer.train()
    with no_file_above(10_000), pytest.raises(OSError, match="disk is full"):
        trainer.save_model()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == old
    trainer.save_model()  # the trained adapter was still in memory
    assert (tmp_path / "adapter_model.safetensors").read_bytes() != old["adapter_model.safetensors"]


# NaN and infinity


def poison(trainer, steps, value=float("nan")):
    """Make the echo of some steps not finite, from inside the first echo network."""
    network = next(iter(trainer.echo_networks.networks.values()))

    def hook(module, args, output):
        delta, gate = output
        return (delta + value if trainer.state.global_step in steps else delta), gate

    network.register_forward_hook(hook)


def overflow_in_backward(trainer, steps):
    """A finite echo loss with infinite gradients."""
    network = next(iter(trainer.echo_networks.networks.values()))

    def hook(module, args, output):
        delta, gate = output
        if trainer.state.global_step in steps and delta.requires_grad:
            delta.register_hook(lambda gradient: gradient * float("inf"))
        return delta, gate

    network.register_forward_hook(hook)


@pytest.mark.parametrize("harm", [poison, overflow_in_backward], ids=["loss", "gradient"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_poisoned_echo_gives_a_plain_step(tmp_path, harm, accumulation):
    settings = {"gradient_accumulation_steps": accumulation, "max_steps": 3, "echo_p_end": 1.0}
    poisoned = echo_trainer(tmp_path / "a", **settings)
    harm(poisoned, {1})
    poisoned.train()

    plain = echo_trainer(tmp_path / "b", **settings)
    collate = plain.get_batch_samples

    def without_echo_in_step_1(*args):
        batches, n_items = collate(*args)
        for batch in batches if plain.state.global_step == 1 else ():
            batch["echo_plan"] = batch["echo_plan"].without_echo()
        return batches, n_items

    plain.get_batch_samples = without_echo_in_step_1
    plain.train()
    assert_equal(adapter(poisoned), adapter(plain))
    assert losses(poisoned) == losses(plain)
    counted = [entry.get("echo/nonfinite", 0) for entry in poisoned.state.log_history[:-1]]
    assert counted == [0, accumulation, 0]


@pytest.mark.parametrize("backward", [False, True], ids=["loss", "gradient"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_one_micro_batch_loses_its_echo_and_the_others_keep_theirs(tmp_path, number, backward):
    """Whichever it is of the step: the weights are those of a run in which it alone was planned without an echo."""
    settings = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2, "max_steps": 3, "echo_p_end": 1.0}
    poisoned = echo_trainer(tmp_path / "a", **settings)
    poison_a_micro_batch(poisoned, number, backward=backward)
    poisoned.train()

    plain = echo_trainer(tmp_path / "b", **settings)
    collate = plain.get_batch_samples

    def without_that_echo(*args):
        batches, n_items = collate(*args)
        if plain.state.global_step == 1:
            batches[number]["echo_plan"] = batches[number]["echo_plan"].without_echo()
        return batches, n_items

    plain.get_batch_samples = without_that_echo
    plain.train()
    assert_equal(adapter(poisoned), adapter(plain))
    assert losses(poisoned) == pytest.approx(losses(plain), rel=1e-6)
    columns = ("echo/nonfinite", "echo/ce_echo", "num_tokens")
    logged, expected = (
        [[entry.get(name, 0) for name in columns] for entry in trainer.state.log_history[:-1]]
        for trainer in (poisoned, plain)
    )
    assert [entry[0] for entry in logged] == [0, 1, 0]
    assert [entry[1:] for entry in logged] == [entry[1:] for entry in expected]


def test_an_echo_that_stays_poisoned_ends_the_run(tmp_path):
    trainer = echo_trainer(tmp_path, max_steps=30, echo_p_end=1.0)
    poison(trainer, range(5, 100), float("inf"))
    with pytest.raises(NonFiniteLossError, match="echo_learning_rate"):
        trainer.train()
    assert trainer.state.global_step == 5 + MAX_IN_A_ROW - 1
    assert all(torch.isfinite(value).all() for value in adapter(trainer).values())


@pytest.mark.parametrize("n_poisoned", [MAX_SKIPPED_IN_A_ROW - 1, 100])
def test_fp16_scaler_skips_and_lasting_skips_end_the_run(tmp_path, n_poisoned):
    """The scaler of fp16, here on float32: it skips steps with infinite gradients, and no weight changes in them."""
    trainer = echo_trainer(tmp_path, max_steps=70, echo_p_end=1.0, lr_scheduler_type="constant")
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    poisoned = range(2, 2 + n_poisoned)
    overflow_in_backward(trainer, poisoned)
    seen = {}

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen[state.global_step] = {name: value.clone() for name, value in adapter(trainer).items()}

    trainer.add_callback(Watch())
    if n_poisoned < MAX_SKIPPED_IN_A_ROW:
        trainer.train()
        assert_equal(seen[2], seen[poisoned.stop])
        assert any(not torch.equal(value, seen[2][name]) for name, value in seen[poisoned.stop + 1].items())
    else:
        with pytest.raises(NonFiniteLossError, match="were all skipped"):
            trainer.train()
        assert trainer.state.global_step == 2 * MAX_SKIPPED_IN_A_ROW  # the scale is looked at this often
        assert_equal(seen[2], adapter(trainer))


def test_echo_networks_that_hold_nan_end_the_run_and_spare_the_adapter(tmp_path):
    trainer = echo_trainer(tmp_path, max_steps=30, echo_p_end=1.0)
    with torch.no_grad():
        next(iter(trainer.echo_networks.parameters())).fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match="echo_learning_rate"):
        trainer.train()
    assert all(torch.isfinite(value).all() for value in adapter(trainer).values())


def test_a_plain_loss_that_is_not_finite_ends_the_run(tmp_path):
    trainer = echo_trainer(tmp_path, max_steps=4)
    before = {}

    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                before.update({name: value.clone() for name, value in adapter(trainer).items()})
                trainer.model.get_base_model().model.norm.weight.data.fill_(float("inf"))

    trainer.add_callback(Break())
    with pytest.raises(NonFiniteLossError, match=r"at step 1 .* No weight was changed"):
        trainer.train()
    assert_equal(adapter(trainer), before)


def test_weights_that_are_not_finite_are_seen_before_the_first_step(tmp_path):
    trainer = echo_trainer(tmp_path, max_steps=4)
    trainer.model.get_base_model().model.norm.weight.data.fill_(float("inf"))
    before = {name: value.clone() for name, value in adapter(trainer).items()}
    with pytest.raises(NonFiniteLossError, match="before the first step"):
        trainer.train()
    assert_equal(adapter(trainer), before)


def test_a_non_finite_adapter_is_not_written(tmp_path):
    trainer = echo_trainer(tmp_path, max_steps=2, **SAVING)
    trainer.train()
    trainer.save_model()
    old = (tmp_path / "adapter_model.safetensors").read_bytes()
    next(p for n, p in trainer.model.named_parameters() if "lora_B" in n).data.fill_(float("nan"))
    with pytest.raises(NonFiniteAdapterError, match=r"lora_B.*last whole checkpoint is .*checkpoint-2"):
        trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == old
    assert not list(tmp_path.glob(f"{STAGING}*"))


def test_what_was_written_is_read_back(tmp_path, monkeypatch):
    trainer = echo_trainer(tmp_path, max_steps=1)
    trainer.train()
    save = type(trainer.model).save_pretrained

    def disk_that_forgets(model, folder, **kwargs):
        save(model, folder, **kwargs)
        flip(Path(folder, "adapter_model.safetensors"))

    monkeypatch.setattr(type(trainer.model), "save_pretrained", disk_that_forgets)
    with pytest.raises(OSError, match="is not what was trained"):
        trainer.save_model()
    assert not (tmp_path / "adapter_model.safetensors").exists()


# Memory


@pytest.mark.parametrize("part", ["comparison of the two passes", "plain pass", "echo pass", "backward pass"])
def test_out_of_memory_says_what_was_running(tmp_path, part):
    trainer = echo_trainer(tmp_path, max_steps=1, gradient_checkpointing=False, lora=lora_config())
    runs = []

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    compared = part == "comparison of the two passes"

    def hook(module, args, output):
        if not module.training:
            return fail() if compared else None
        runs.append(module)
        if len(runs) == {"plain pass": 1, "echo pass": 2}.get(part):
            fail()
        hidden = output[0] if isinstance(output, tuple) else output
        if part == "backward pass" and hidden.requires_grad:
            hidden.register_hook(fail)
        return None

    trainer.model.get_base_model().model.layers[-1].register_forward_hook(hook)
    with pytest.raises(torch.OutOfMemoryError) as error:
        trainer.train()
    note = error.value.__notes__[0]
    rows = 2 if compared else 4
    assert f"during the {part}" in note and f"{rows} rows of" in note
    assert f"{rows} of {rows} samples in the echo pass" in note
    assert "per_device_train_batch_size" in note and "echo_p_start" in note
