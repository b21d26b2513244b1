"""What a run starts from: something is trained, building a trainer changes nothing, and the KL begins at 0."""

import pytest
import torch
from beam_cases import beam_trainer, tiny_base
from models import adapted, lora_config, tiny_model
from peft import FourierFTConfig, IA3Config, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM


def frozen_adapter(folder):
    adapted(tiny_model()).save_pretrained(folder)
    return PeftModel.from_pretrained(tiny_model(), folder)


def frozen_base():
    return tiny_model().requires_grad_(False)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_an_adapter_that_is_not_trained(tmp_path, beta):
    with pytest.raises(ValueError, match=r"no trainable parameter .* is_trainable=True"):
        beam_trainer(tmp_path / "out", model=frozen_adapter(tmp_path / "sft"), lora=False, beta=beta)


def test_a_model_that_is_not_trained(tmp_path):
    with pytest.raises(ValueError, match=r"All weights of the model are frozen .* `peft_config`"):
        beam_trainer(tmp_path, model=frozen_base(), lora=False, beta=0.0)
    beam_trainer(tmp_path, model=frozen_base())


def first_divergence(trainer):
    trainer.train()
    return trainer.state.log_history[0]["kl"]


@pytest.mark.parametrize("start", ["pissa", "olora", False, True])
def test_building_a_trainer_leaves_the_model_as_it_is(tmp_path, start):
    model = get_peft_model(tiny_model(), lora_config(init_lora_weights=start)).eval()
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    trainer = beam_trainer(tmp_path, model=model, lora=False, max_steps=1)
    assert torch.equal(trainer.model.eval()(ids).logits, before)
    assert model.peft_config["default"].init_lora_weights == start
    assert first_divergence(trainer) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", False])
def test_a_new_adapter_that_changes_the_model(tmp_path, start):
    with pytest.raises(
        ValueError, match=rf"with init_lora_weights={start!r} .* Write init_lora_weights=True, or beta=0"
    ):
        beam_trainer(tmp_path, lora=lora_config(init_lora_weights=start))
    if start in ("pissa", "olora", False):
        beam_trainer(tmp_path, lora=lora_config(init_lora_weights=start), beta=0.0)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (FourierFTConfig(n_frequency=8, target_modules=["q_proj"]), "init_weights=False"),
        (
            IA3Config(target_modules=["q_proj"], feedforward_modules=[], init_ia3_weights=False),
            "init_ia3_weights=False",
        ),
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "a PromptTuningConfig"),
    ],
)
def test_other_adapters_that_change_the_model(tmp_path, config, words):
    with pytest.raises(ValueError, match=f"with {words} the adapter changes the model"):
        beam_trainer(tmp_path, lora=config)


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", True])
def test_a_new_adapter_that_changes_nothing(tmp_path, start):
    trainer = beam_trainer(tmp_path, lora=lora_config(init_lora_weights=start), max_steps=1)
    assert first_divergence(trainer) == pytest.approx(0, abs=1e-6)


def all_weights(model):
    for value in model.parameters():
        value.data += 0.05


def one_weight(model):
    model.model.norm.weight.data[3] += 0.5


def more_tokens(model):
    model.resize_token_embeddings(64)


@pytest.mark.parametrize("change", [all_weights, one_weight, more_tokens])
def test_a_model_that_was_changed_in_memory(tmp_path, change):
    base = tiny_base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    change(model)
    with pytest.raises(ValueError, match=r"of the given model's tensors, .* are not those that are saved there"):
        beam_trainer(tmp_path / "out", model=model, lora=False)
    beam_trainer(tmp_path / "out", model=model, lora=False, beta=0.0)


def test_a_model_as_it_was_saved(tmp_path):
    base = tiny_base(tmp_path / "base")
    for model in (base, AutoModelForCausalLM.from_pretrained(base)):
        assert first_divergence(beam_trainer(tmp_path / "out", model=model, lora=False, max_steps=1)) == 0


@pytest.mark.parametrize("names", [["sft"], ["sft", "other"], ["default", "other"]])
def test_an_adapter_with_a_name(tmp_path, names):
    model = get_peft_model(tiny_model(), lora_config(), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, lora_config())
    model.set_adapter(names[-1])
    with pytest.raises(ValueError, match=f"{names[-1]}.*without `adapter_name`"):
        beam_trainer(tmp_path, model=model, lora=False)
