"""Never save what cannot run: the saved adapter is loaded as a user does, and compared; what cannot run is refused."""

import json
import types

import pytest
import torch
from accelerate import dispatch_model
from datasets import Dataset
from models import AutoModelForCausalLM, adapted, lora_config, prompt_completion_rows, tiny_model, tiny_tokenizer
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from training import SETTINGS, adapter, assert_equal, echo_trainer

import echo_trainer.run.reload as reload_module
from echo_trainer import EchoSFTConfig, EchoSFTTrainer
from echo_trainer.adapter.read import read_adapter
from echo_trainer.passes.own_forward import UnusableModelError
from echo_trainer.run.reload import UnloadableAdapterError, compare_reloaded
from echo_trainer.run.save import UNLOADABLE

IDS = torch.arange(2, 20)[None]


def saved(model, folder):
    """A PEFT model's adapters as PEFT saves them, read."""
    model.save_pretrained(folder)
    return {name: read_adapter(folder if name == "default" else folder / name) for name in model.active_adapters}


def moved(model):
    """The model with every trainable number moved, as after training."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape).to(parameter.dtype) * 0.05)
    return model


ADAPTERS = {
    "lora": (tiny_model, {}),
    "dora": (tiny_model, {"use_dora": True}),
    "saved modules": (tiny_model, {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "tokens": (tiny_model, {"trainable_token_indices": [3, 4]}),
    "tokens of a tied base": (lambda: tiny_model(tie_word_embeddings=True), {"trainable_token_indices": [3, 4]}),
    "embedding": (tiny_model, {"target_modules": ["q_proj", "embed_tokens"]}),
    "conv1d": (lambda: tiny_model("gpt2"), {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "bfloat16": (lambda: tiny_model(dtype=torch.bfloat16), {}),
    "patterns": (tiny_model, {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True}),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_sound_adapter_is_equal_and_nothing_is_disturbed(name, tmp_path, monkeypatch):
    base, settings = ADAPTERS[name]
    model = moved(adapted(base(), init_lora_weights=True, **settings)).train()
    files = saved(model, tmp_path)
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    modes, state = [module.training for module in model.modules()], torch.random.get_rng_state()
    bases = []
    load = reload_module.with_adapter
    monkeypatch.setattr(reload_module, "with_adapter", lambda base, files: bases.append(base) or load(base, files))
    shared = {p.data_ptr() for p in model.parameters()}

    assert compare_reloaded(files, model) is None

    (loaded_on,) = bases
    own = [p for name, p in loaded_on.named_parameters() if "lora_" not in name and "modules_to_save" not in name]
    assert own and all(p.data_ptr() in shared for p in own if "trainable_tokens" not in name and "token" not in name)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, before[key][0]) and parameter.requires_grad == before[key][1]


@pytest.mark.parametrize("change", [
    lambda tensors: {k: v * 1.5 if "q_proj.lora_B" in k else v for k, v in tensors.items()},
    lambda tensors: {k: v for k, v in tensors.items() if "layers.1.mlp" not in k or "lora_B" not in k},
    lambda tensors: {k.replace("layers.2.", "layers.9."): v for k, v in tensors.items()},
    lambda tensors: {k: v[:, :7] if "lora_A" in k else v for k, v in tensors.items()},
], ids=["values", "missing", "names", "shapes"])  # fmt: skip
def test_another_adapter_is_found_out(change, tmp_path):
    model = moved(adapted(tiny_model()))
    saved(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: v.contiguous() for k, v in change(load_file(file)).items()}, file)
    with pytest.raises(UnloadableAdapterError):
        compare_reloaded({"default": read_adapter(tmp_path)}, model)


@pytest.mark.parametrize(("settings", "why"), [
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' has changed the base"),
    ({"layer_replication": [[0, 3], [1, 5]]}, "layer_replication has changed the base"),
])  # fmt: skip
def test_what_is_not_compared_is_said(settings, why, tmp_path, caplog):
    trainer = echo_trainer(tmp_path, lora=lora_config(**{"init_lora_weights": True, **settings}), max_steps=1)
    trainer.train()
    trainer.save_model()
    assert why in caplog.text and "not loaded again" in caplog.text
    assert (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("wrong", [False, True])
def test_a_model_with_hooks_of_accelerate_runs_on_its_own_copy(wrong, tmp_path):
    """As a model on several devices has them; a trainer has put a forward of its own on top."""
    model = dispatch_model(tiny_model(), {"": "cpu"}, force_hooks=True)
    hooked = model.forward
    model.forward = types.MethodType(lambda self, *args, **kwargs: hooked(*args, **kwargs), model)
    model = moved(adapted(model))
    files = saved(model, tmp_path)
    if wrong:
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if "lora_B" in name).add_(1)
        with pytest.raises(UnloadableAdapterError, match="something else"):
            compare_reloaded(files, model)
    else:
        assert compare_reloaded(files, model) is None


def test_a_sharded_base_is_not_compared(tmp_path):
    model = adapted(tiny_model())
    files = saved(model, tmp_path)
    next(model.parameters()).ds_id = 0  # as DeepSpeed's ZeRO-3 marks what it has sharded
    assert compare_reloaded(files, model) == "the base is sharded over processes"


# What cannot run is refused before training


def broken_head(model):
    model.lm_head.forward = types.MethodType(lambda self, x: self.nothing(x), model.lm_head)
    return model


UNUSABLE = {
    "tied base, tokens and a saved head": (
        lambda: tiny_model(tie_word_embeddings=True),
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6], "modules_to_save": ["lm_head"]},
        "TrainableTokensLayer",
    ),
    "the same in another family": (
        lambda: tiny_model("qwen2", tie_word_embeddings=True),
        {"target_modules": ["v_proj"], "trainable_token_indices": [9], "modules_to_save": ["lm_head"]},
        "TrainableTokensLayer",
    ),
    "a head that does not run": (lambda: broken_head(tiny_model()), {}, "no attribute 'nothing'"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_model_that_cannot_run_is_refused_before_training(name, tmp_path):
    base, settings, why = UNUSABLE[name]
    trainer = echo_trainer(tmp_path, model=base(), lora=lora_config(**{"init_lora_weights": True, **settings}))
    before = adapter(trainer)
    with pytest.raises(UnusableModelError, match="nobody could use what would be trained") as caught:
        trainer.train()
    assert why in str(caught.value) and trainer.state.global_step == 0
    assert_equal(adapter(trainer), before)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("part", ["norm", "embed_tokens", "layers.1.mlp.up_proj.base_layer"])
def test_weights_that_no_adapter_holds_are_refused(part, tmp_path):
    model = adapted(tiny_model())
    for name, parameter in model.named_parameters():
        if f".{part}." in name:
            parameter.requires_grad_(True)
    with pytest.raises(ValueError, match=f"weights of the base itself are trainable.*{part}.*modules_to_save"):
        trained(model, tmp_path)


@pytest.mark.parametrize("init", ["pissa_niter_4", "pissa_niter_16", "corda"])
def test_a_base_that_peft_does_not_change_again_is_refused(init, tmp_path):
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}'.*Use 'pissa', 'olora' or True"):
        echo_trainer(tmp_path, lora=lora_config(init_lora_weights=init))


def trained(model, folder, **settings):
    """A trainer of a PeftModel, after its training."""
    trainer = EchoSFTTrainer(
        model=model,
        args=EchoSFTConfig(output_dir=str(folder), **{**SETTINGS, "max_steps": 2, **settings}),
        train_dataset=Dataset.from_list(prompt_completion_rows(16)),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    return trainer


# What cannot be loaded is set aside


@pytest.mark.parametrize("where", ["layers.1.mlp", "layers.3.self_attn.o_proj", "norm"])
def test_what_is_not_in_the_adapter_sets_it_aside(where, tmp_path):
    """A base that somebody has patched in memory: whoever loads the adapter has another one."""
    first = echo_trainer(tmp_path, max_steps=1)
    first.train()
    first.save_model()
    good = (tmp_path / "adapter_model.safetensors").read_bytes()
    model = tiny_model()
    module = model.model.get_submodule(where)
    own = module.forward
    module.forward = types.MethodType(lambda self, *args, **kwargs: own(*args, **kwargs) * 0.5, module)
    trainer = echo_trainer(tmp_path, model=model, max_steps=1, learning_rate=5e-2)
    trainer.train()
    with pytest.raises(UnloadableAdapterError, match="computes something else than the trained model"):
        trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == good
    aside = tmp_path / UNLOADABLE / "files"
    assert load_file(aside / "adapter_model.safetensors")
    assert not (tmp_path / ".unfinished").exists()
    assert read_adapter(tmp_path).folder == tmp_path


# New tokens


@pytest.mark.parametrize("settings", [
    {},
    {"modules_to_save": ["embed_tokens", "lm_head"]},
    {"trainable_token_indices": [60, 61]},
    {"target_modules": ["q_proj", "embed_tokens"]},
])  # fmt: skip
@pytest.mark.parametrize("known", [True, False], ids=["base known", "Hub not reached"])
def test_embeddings_of_new_tokens_are_saved(known, settings, tmp_path):
    """PEFT saves a resized embedding where it finds the base's config, and takes no answer for "not resized"."""
    tiny_model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(66)
    lora = LoraConfig(**{"r": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings})
    if not known:
        lora.base_model_name_or_path = "nobody/nothing"
    trainer = echo_trainer(tmp_path / "out", model=model, lora=lora, max_steps=2)
    if not known:
        trainer.model.peft_config["default"].base_model_name_or_path = "nobody/nothing"
    trainer.train()
    trainer.save_model()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(66)
    ids = torch.arange(48, 66)[None]
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(base, tmp_path / "out").eval()(input_ids=ids).logits
        expected = trainer.model.eval()(input_ids=ids).logits
    torch.testing.assert_close(loaded, expected, rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["target_modules"]
