"""Training that goes on: from a finished adapter, beside a frozen one, under another name, on a quantised base."""

import importlib.util
import json

import pytest
import torch
from datasets import Dataset
from models import AutoModelForCausalLM, adapted, lora_config, prompt_completion_rows, tiny_model, tiny_tokenizer
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from training import SETTINGS, adapter, assert_equal, echo_trainer, losses, plain_trainer, revive
from trl import SFTConfig, SFTTrainer

from echo_trainer import EchoSFTConfig, EchoSFTTrainer, check_adapter, evaluate_adapter
from echo_trainer.export.forms import export_merged, export_portable
from echo_trainer.hub.files import copy_run

IDS = torch.arange(2, 20)[None]
OFF = {"echo_p_start": 0.0, "echo_p_end": 0.0}
BESIDES = {"README.md", "echo_run.json", "assets", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}


def on_model(model, folder, trainer_class=EchoSFTTrainer, config=EchoSFTConfig, **settings):
    return trainer_class(
        model=model,
        args=config(output_dir=str(folder), **{**SETTINGS, "max_steps": 3, **settings}),
        train_dataset=Dataset.from_list(prompt_completion_rows(24)),
        processing_class=tiny_tokenizer(),
    )


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def tensors(model, name):
    return {key: p.detach().clone() for key, p in model.named_parameters() if f".{name}." in key}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_model(hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["portable", "as trained"])
def finished(request, base, tmp_path_factory):
    """A finished run's folder."""
    folder = tmp_path_factory.mktemp("finished")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora_config(init_lora_weights=True))
    trainer = on_model(model, folder, portable_adapter=request.param)
    trainer.train()
    trainer.save_model()
    return folder


def loaded(base, folder, name="default", trainable=True):
    model = AutoModelForCausalLM.from_pretrained(base)
    return PeftModel.from_pretrained(model, folder, adapter_name=name, is_trainable=trainable)


# From a finished adapter


@pytest.mark.parametrize("name", ["default", "mine"])
def test_training_goes_on_from_a_finished_adapter(name, base, finished, tmp_path):
    trainer = on_model(loaded(base, finished, name), tmp_path, learning_rate=1e-2)
    before = logits(trainer.model)
    torch.testing.assert_close(before, logits(loaded(base, finished)), rtol=0, atol=0)
    trainer.train()
    trainer.save_model()
    assert (logits(trainer.model) - before).abs().max() > 1e-3
    where = tmp_path if name == "default" else tmp_path / name
    torch.testing.assert_close(logits(loaded(base, where)), logits(trainer.model), rtol=1e-5, atol=1e-5)
    assert check_adapter(tmp_path, base=base).ok


def test_without_an_echo_it_goes_on_as_in_trl(base, finished, tmp_path):
    echo = on_model(loaded(base, finished), tmp_path / "echo", **OFF)
    plain = on_model(loaded(base, finished), tmp_path / "trl", SFTTrainer, SFTConfig)
    echo.train(), plain.train()
    assert losses(echo) == losses(plain)
    assert_equal(adapter(echo), adapter(plain))


def test_a_frozen_adapter_is_refused(base, finished, tmp_path):
    with pytest.raises(ValueError, match=r"no trainable LoRA parameter.*is_trainable=True"):
        on_model(loaded(base, finished, trainable=False), tmp_path)


# Beside a frozen one


@pytest.mark.parametrize(("frozen", "trained"), [("default", "second"), ("first", "default"), ("one", "two")])
def test_a_second_adapter_is_trained_beside_a_frozen_one(frozen, trained, base, finished, tmp_path):
    model = loaded(base, finished, frozen, trainable=False)
    model.add_adapter(trained, lora_config(init_lora_weights=True, r=2, target_modules=["q_proj", "v_proj"]))
    model.set_adapter(trained)
    trainer = on_model(model, tmp_path, save_strategy="steps", save_steps=2)
    assert {site.name.rpartition(".")[2] for site in trainer.echo.sites} == {"q_proj", "v_proj"}
    before = tensors(model, frozen)
    moving = tensors(model, trained)
    trainer.train()
    trainer.save_model()
    assert_equal(tensors(model, frozen), before)
    assert not any(torch.equal(value, moving[key]) for key, value in tensors(model, trained).items())
    # The trained one alone is written, where PEFT puts it.
    where = tmp_path if trained == "default" else tmp_path / trained
    found = sorted(path.parent for path in tmp_path.rglob("adapter_config.json") if "checkpoint" not in str(path))
    assert found == [where]
    torch.testing.assert_close(logits(loaded(base, where)), logits(model), rtol=1e-5, atol=1e-5)
    # A checkpoint has both, and goes on with both.
    again = loaded(base, finished, frozen, trainable=False)
    again.add_adapter(trained, lora_config(init_lora_weights=True, r=2, target_modules=["q_proj", "v_proj"]))
    again.set_adapter(trained)
    other = on_model(again, tmp_path, save_strategy="steps", save_steps=2)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(tensors(again, trained), tensors(model, trained))
    assert_equal(tensors(again, frozen), before)


def test_adapters_that_are_active_together_are_refused(base, finished, tmp_path):
    model = loaded(base, finished, "one")
    model.add_adapter("two", lora_config())
    model.base_model.set_adapter(["one", "two"])
    with pytest.raises(ValueError, match=r"one, two are active together.*merge_and_unload"):
        on_model(model, tmp_path)


# Under another name


def test_an_adapter_of_another_name_is_found_by_every_tool(base, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora_config(r=12), adapter_name="mine")
    out = tmp_path / "out"
    trainer = on_model(model, out)
    revive(trainer)
    trainer.train()
    trainer.save_model()
    assert {path.name for path in out.iterdir()} == BESIDES | {"mine"}
    assert json.loads((out / "mine/adapter_config.json").read_text())["r"] == 16
    report = check_adapter(out, base=base)
    assert report.ok and report.files.folder == out / "mine"
    expected = logits(trainer.model)
    torch.testing.assert_close(logits(loaded(base, export_portable(out, tmp_path / "p", base))), expected)
    assert (tmp_path / "p/tokenizer.json").exists() and (tmp_path / "p/README.md").exists()
    export_merged(out, tmp_path / "m", base, dtype="float32")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m")), expected, rtol=1e-4, atol=1e-4
    )
    (tmp_path / "task.jsonl").write_text(json.dumps(prompt_completion_rows(1)[0]) + "\n")
    values = [
        evaluate_adapter(name, [str(tmp_path / "task.jsonl")], base=str(b) if b else None, mode="nll",
                         output=tmp_path / f"e{i}", device="cpu")["results"][0]["value"]
        for i, (name, b) in enumerate([(out, base), (tmp_path / "m", None)])
    ]  # fmt: skip
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    (tmp_path / "push").mkdir()
    assert copy_run(out, tmp_path / "push").digest == report.files.digest


def test_an_adapter_of_another_name_resumes_bit_for_bit(base, tmp_path):
    def trainer():
        model = AutoModelForCausalLM.from_pretrained(base)
        torch.manual_seed(5)
        model = get_peft_model(model, lora_config(init_lora_weights=True), adapter_name="mine")
        return on_model(model, tmp_path, max_steps=4, save_strategy="steps", save_steps=2)

    whole = trainer()
    whole.train()
    again = trainer()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(adapter(again), adapter(whole))
    assert losses(again) == losses(whole)


# On a quantised base

HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")
QUANTISED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "nf4, nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


def quantised(base, name):
    from transformers import BitsAndBytesConfig

    return AutoModelForCausalLM.from_pretrained(base, quantization_config=BitsAndBytesConfig(**QUANTISED[name]))


@needs_bitsandbytes
@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_base(name, base, tmp_path, caplog):
    trainer = echo_trainer(tmp_path / "out", model=quantised(base, name), max_steps=4, learning_rate=1e-2)
    assert len(trainer.echo.sites) == 7
    revive(trainer)
    frozen = {key: p.clone() for key, p in trainer.model.named_parameters() if not p.requires_grad}
    before = adapter(trainer)
    trainer.train()
    trainer.save_model()
    assert "not loaded again" not in caplog.text
    assert trainer.state.log_history[0]["echo/routed"] == 1.0
    assert not any(torch.equal(value, before[key]) for key, value in adapter(trainer).items())
    assert all(torch.equal(p, frozen[key]) for key, p in trainer.model.named_parameters() if key in frozen)
    assert check_adapter(tmp_path / "out", base=base).ok
    reloaded = PeftModel.from_pretrained(quantised(base, name), tmp_path / "out")
    expected = logits(trainer.model).float()
    assert (logits(reloaded).float() - expected).norm() < 0.1 * expected.norm()
    assert export_merged(tmp_path / "out", tmp_path / "m", base).same_top > 0.9


@needs_bitsandbytes
def test_an_evaluation_changes_no_step_on_a_4bit_base(base, tmp_path):
    """bitsandbytes packs 4-bit weights on a CPU when they are evaluated, and then computes wrong gradients."""
    rows = {"trainer_kwargs": {"eval_dataset": Dataset.from_list(prompt_completion_rows(4, seed=9))}}
    runs = []
    for name, settings in {
        "never": {},
        "often": {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True},
    }.items():
        trainer = echo_trainer(tmp_path / name, model=quantised(base, "nf4"), max_steps=3, **rows, **settings)
        trainer.train()
        runs.append((losses(trainer), adapter(trainer)))
    assert runs[0][0] == runs[1][0]
    assert_equal(runs[0][1], runs[1][1])


@needs_bitsandbytes
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_without_an_echo_a_quantised_base_is_that_of_trl(name, base, tmp_path):
    echo = echo_trainer(tmp_path / "echo", model=quantised(base, name), max_steps=3, **OFF)
    plain = plain_trainer(tmp_path / "trl", model=quantised(base, name), max_steps=3)
    echo.train(), plain.train()
    assert losses(echo) == losses(plain)
    assert_equal(adapter(echo), adapter(plain))


# Options


def with_evaluation(folder, build=echo_trainer, **settings):
    rows = {"eval_dataset": Dataset.from_list(prompt_completion_rows(8, seed=5))}
    return build(folder, trainer_kwargs=rows, max_steps=4, **settings)


def test_eval_on_start(tmp_path):
    """One evaluation more, of the model before any step, and not a bit changed in training."""
    plain, first = with_evaluation(tmp_path / "a"), with_evaluation(tmp_path / "b", eval_on_start=True)
    trl = with_evaluation(tmp_path / "c", plain_trainer, eval_on_start=True)
    for trainer in (plain, first, trl):
        trainer.train()
    assert losses(plain) == losses(first)
    assert_equal(adapter(plain), adapter(first))
    (entry,) = [entry for entry in first.state.log_history if "eval_loss" in entry]
    (same,) = [entry for entry in trl.state.log_history if "eval_loss" in entry]
    assert (entry["step"], entry["eval_loss"]) == (0, same["eval_loss"])


def test_save_strategy_best(tmp_path):
    trainer = with_evaluation(
        tmp_path, save_strategy="best", eval_strategy="steps", eval_steps=1, metric_for_best_model="eval_loss",
        greater_is_better=False, load_best_model_at_end=True, learning_rate=5e-2,
    )  # fmt: skip
    trainer.train()
    evaluated = [(entry["eval_loss"], entry["step"]) for entry in trainer.state.log_history if "eval_loss" in entry]
    best = min(evaluated)[1]
    improved = [
        step for i, (loss, step) in enumerate(evaluated) if loss < min([x for x, _ in evaluated[:i]], default=9e9)
    ]
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in improved}
    saved = load_file(tmp_path / f"checkpoint-{best}/adapter_model.safetensors")
    assert all(torch.equal(value, saved[key.replace(".default", "")]) for key, value in adapter(trainer).items())
    networks = load_file(tmp_path / f"checkpoint-{best}/echo_networks.safetensors")
    assert all(torch.equal(value, networks[key]) for key, value in trainer.echo_networks.state_dict().items())
    trainer.save_model()
    assert json.loads((tmp_path / "echo_run.json").read_text())["steps"]["adapter"] == best


@pytest.mark.parametrize("echo_pass", ["suffix", "full"])
def test_neftune_noise(echo_pass, tmp_path):
    """Noise on the embeddings in training, none in evaluation, none left on the model."""
    runs = {}
    for alpha in (None, 5.0):
        trainer = with_evaluation(tmp_path / str(alpha), neftune_noise_alpha=alpha, echo_pass=echo_pass)
        revive(trainer)
        start = trainer.evaluate()["eval_loss"]
        trainer.train()
        runs[alpha] = start, losses(trainer)
        hooks = trainer.model.get_input_embeddings()._forward_hooks.values()
        assert not [hook for hook in hooks if "neftune" in hook.__qualname__]
        trainer.save_model()  # loaded again and compared, without noise
    assert runs[None][0] == runs[5.0][0]
    assert all(a != b for a, b in zip(runs[None][1], runs[5.0][1], strict=True))


def test_neftune_noise_is_that_of_trl_without_an_echo(tmp_path):
    runs = []
    for build, settings in ((echo_trainer, OFF), (plain_trainer, {})):
        trainer = build(tmp_path / str(len(runs)), neftune_noise_alpha=5.0, **settings)
        trainer.train()
        runs.append((losses(trainer), adapter(trainer)))
    assert runs[0][0] == runs[1][0]
    assert_equal(runs[0][1], runs[1][1])


def test_torch_compile_stated_as_false_is_the_default(tmp_path):
    runs = []
    for settings in ({}, {"torch_compile": False}):
        trainer = echo_trainer(tmp_path / str(len(runs)), **settings)
        trainer.train()
        runs.append((losses(trainer), adapter(trainer)))
    assert runs[0][0] == runs[1][0]
    assert_equal(runs[0][1], runs[1][1])


HAS_LIGER = all(importlib.util.find_spec(name) is not None for name in ("liger_kernel", "triton"))


@pytest.mark.skipif(HAS_LIGER, reason="Liger is installed")
@pytest.mark.parametrize("build", [echo_trainer, plain_trainer])
def test_liger_kernels_that_are_not_installed_are_asked_for(build, tmp_path):
    trainer = build(tmp_path, use_liger_kernel=True)
    with pytest.raises(ImportError, match=r"[Ll]iger"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.skipif(not (HAS_LIGER and torch.cuda.is_available()), reason="needs Liger and a GPU")
def test_liger_kernels(tmp_path):
    """The pass is proved with the kernels in place, and what is saved is compared with them."""
    runs = []
    for use in (False, True):
        trainer = echo_trainer(tmp_path / str(use), use_liger_kernel=use, use_cpu=False)
        trainer.train()
        trainer.save_model()
        runs.append(losses(trainer))
    assert runs[1] == pytest.approx(runs[0], rel=1e-3)


def test_ligers_own_loss_is_refused(tmp_path):
    with pytest.raises(ValueError, match="fused_linear_cross_entropy"):
        echo_trainer(tmp_path, use_liger_kernel=True, liger_kernel_config={"fused_linear_cross_entropy": True})


def test_an_adapter_on_an_adapted_model_that_was_merged(base, finished, tmp_path):
    """What the refusal of two active adapters advises."""
    merged = loaded(base, finished).merge_and_unload()
    trainer = on_model(adapted(merged, init_lora_weights=True), tmp_path)
    trainer.train()
    trainer.save_model()
    again = PeftModel.from_pretrained(loaded(base, finished).merge_and_unload(), tmp_path)
    torch.testing.assert_close(logits(again), logits(trainer.model), rtol=1e-5, atol=1e-5)
