"""Edges that an attack on the trainer found: adapters, optimizers, collators and models used in unusual ways."""

import json

import pytest
import torch
from datasets import Dataset
from models import FAMILIES, VOCABULARY, lora_config, prompt_completion_rows, tiny_model, tiny_tokenizer
from peft import get_peft_model
from safetensors.torch import load_file
from steps import padded_collator
from training import adapter, echo_trainer, losses, plain_trainer, revive, trainable
from transformers import AutoConfig, LlamaForCausalLM

from echo_trainer import EchoSFTConfig, EchoSFTTrainer


def on_model(model, folder, **kwargs):
    """A trainer on a PeftModel."""
    settings = {"use_cpu": True, "bf16": False, "max_steps": 3, "report_to": "none", "save_strategy": "no"}
    return EchoSFTTrainer(
        model=model,
        args=EchoSFTConfig(output_dir=str(folder), **settings, **kwargs.pop("settings", {})),
        train_dataset=Dataset.from_list(prompt_completion_rows(16)),
        processing_class=tiny_tokenizer(),
        **kwargs,
    )


def test_activated_lora_is_refused(tmp_path):
    with pytest.raises(ValueError, match="activated LoRA"):
        echo_trainer(tmp_path, lora=lora_config(alora_invocation_tokens=[3]))


def test_optimizer_of_the_caller_trains_the_echo_networks(tmp_path):
    model = get_peft_model(tiny_model(), lora_config())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    trainer = on_model(model, tmp_path, optimizers=(optimizer, None))
    before = trainable(trainer)
    trainer.train()
    moved = [name for name, value in trainable(trainer).items() if not torch.equal(value, before[name])]
    assert any(name.endswith("project_out") for name in moved)


def test_adapter_of_another_name_is_saved(tmp_path):
    model = get_peft_model(tiny_model(), lora_config(), adapter_name="mine")
    trainer = on_model(model, tmp_path)
    trainer.train()
    trainer.save_model()
    assert all("lora_" in name for name in load_file(tmp_path / "mine" / "adapter_model.safetensors"))
    assert json.loads((tmp_path / "echo_run.json").read_text())["adapter"]["r"] == 4


def left_padded(examples):
    batch = padded_collator()(examples)
    for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        rows = []
        for row, example in zip(batch[name], examples, strict=True):
            length = len(example["input_ids"])
            rows.append(torch.cat([row.new_full((len(row) - length,), fill), row[:length]]))
        batch[name] = torch.stack(rows)
    return batch


def four_dimensional_mask(examples):
    batch = padded_collator()(examples)
    length = batch["input_ids"].shape[1]
    causal = torch.ones(length, length).tril().bool()
    batch["attention_mask"] = causal & batch["attention_mask"].bool()[:, None, None, :]
    return batch


def test_left_padding_is_proved_and_served(tmp_path):
    kwargs = {"trainer_kwargs": {"data_collator": left_padded}, "max_steps": 2}
    trainer = echo_trainer(tmp_path / "auto", **kwargs)
    trainer.train()
    trainer.save_model()
    record = json.loads((tmp_path / "auto" / "echo_run.json").read_text())
    assert record["echo"]["pass"] == "suffix"
    assert record["echo"]["proof"][0]["batches"] == "rows padded on the left"
    full = echo_trainer(tmp_path / "full", echo_pass="full", **kwargs)
    full.train()
    torch.testing.assert_close(losses(trainer), losses(full), rtol=1e-5, atol=0)


def test_a_mask_of_ones_own_runs_the_full_pass_and_says_so(tmp_path, caplog):
    """It may mean something else in every batch, so no batch proves anything about the next."""
    kwargs = {"trainer_kwargs": {"data_collator": four_dimensional_mask}, "max_steps": 2}
    trainer = echo_trainer(tmp_path / "auto", **kwargs)
    trainer.train()
    assert len([r for r in caplog.records if "runs whole sequences" in r.getMessage()]) == 1
    trainer.save_model()
    record = json.loads((tmp_path / "auto" / "echo_run.json").read_text())
    assert record["echo"]["pass"] == "full"
    full = echo_trainer(tmp_path / "full", echo_pass="full", **kwargs)
    full.train()
    assert losses(trainer) == losses(full)
    strict = echo_trainer(tmp_path / "strict", echo_pass="suffix", **kwargs)
    with pytest.raises(ValueError, match=r"echo_pass='suffix' is not exact .* attention mask of 4 dimensions"):
        strict.train()


def test_training_again_and_resuming_from_it(tmp_path):
    settings = {"echo_learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 3}
    trainer = echo_trainer(tmp_path, **settings)
    trainer.create_optimizer()
    trainer.create_optimizer()
    assert all(group["params"] for group in trainer.optimizer.param_groups)
    n_groups = len(trainer.optimizer.param_groups)
    trainer.train()
    trainer.train()
    assert len(trainer.optimizer.param_groups) == n_groups
    echo_trainer(tmp_path / "again", **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_unwrapping_keeps_the_model_whole(tmp_path):
    trainer = echo_trainer(tmp_path, bf16=True, max_steps=1)
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    assert model(input_ids=torch.tensor([[3, 4, 5]])).logits.shape == (1, 3, 60)


def test_rows_without_labels_are_refused(tmp_path):
    rows = [{"input_ids": [3, 4, 5]}] * 8
    with pytest.raises(ValueError, match="no boundary"):
        echo_trainer(tmp_path, rows=rows, dataset_kwargs={"skip_prepare_dataset": True})


def test_resume_with_other_echo_options_is_refused(tmp_path):
    echo_trainer(tmp_path / "a", save_strategy="steps", save_steps=3, max_steps=3).train()
    checkpoint = str(tmp_path / "a" / "checkpoint-3")
    for settings, message in (
        ({"echo_positions": "predicting"}, "positions was 'answer', is 'predicting'"),
        ({"echo_source_layers": [3]}, "source_layers was \\[4\\], is \\[3\\]"),
        ({"echo_target_layers": [0]}, "targets was"),
        ({"echo_seed": 9}, "seed was 1, is 9"),
        ({"echo_p_start": 0.0, "echo_p_end": 0.0}, "has it off"),
    ):
        with pytest.raises(ValueError, match=message):
            echo_trainer(tmp_path / "b", **settings).train(resume_from_checkpoint=checkpoint)


def test_divergence_is_logged_also_without_distillation(tmp_path):
    trainer = echo_trainer(tmp_path, echo_kd_weight=0.0, max_steps=1)
    revive(trainer)
    trainer.train()
    assert trainer.state.log_history[0]["echo/kd"] > 0


def test_a_run_whose_metrics_were_not_finite_leaves_a_record_that_is_json(tmp_path):
    trainer = echo_trainer(tmp_path, max_steps=1)
    trainer.train()
    trainer.state.log_history.append({"loss": float("nan"), "step": 2})
    trainer.save_model()
    record = (tmp_path / "echo_run.json").read_text()
    assert "NaN" not in record
    assert json.loads(record)["metrics"][-1]["loss"] == "nan"


class RulesOut(LlamaForCausalLM):
    """A model that rules tokens out, such as those that pad its vocabulary."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        banned = torch.arange(outputs.logits.shape[-1]) >= VOCABULARY
        outputs.logits = outputs.logits.masked_fill(banned.to(outputs.logits.device), -torch.inf)
        return outputs


@pytest.mark.parametrize("teacher", ["echo", "plain", "mutual"])
def test_a_model_that_rules_tokens_out(tmp_path, teacher):
    """Losses, distillation and weights are those of the model without these tokens."""
    small = tiny_model()
    wide = RulesOut(AutoConfig.for_model("llama", **{**FAMILIES["llama"], "vocab_size": VOCABULARY + 4}))
    state = wide.state_dict() | {n: v for n, v in small.state_dict().items() if v.shape[0] != VOCABULARY}
    for name, value in small.state_dict().items():
        if value.shape[0] == VOCABULARY:
            state[name][:VOCABULARY] = value
    wide.load_state_dict(state)
    runs = []
    for name, model in (("small", small), ("wide", wide)):
        trainer = echo_trainer(tmp_path / name, model=model, echo_p_end=1.0, echo_teacher=teacher, max_steps=4)
        revive(trainer)
        trainer.train()
        runs.append(trainer)
    for key in ("loss", "echo/kd", "echo/ce_echo", "entropy"):
        ours, theirs = ([entry[key] for entry in t.state.log_history if key in entry] for t in runs)
        assert len(ours) == 4 and ours == pytest.approx(theirs, rel=1e-4), key
    assert max(entry.get("echo/kd", 0) for entry in runs[1].state.log_history) > 0


class PerMicroBatch(LlamaForCausalLM):
    """As the conditional-generation classes of Qwen3-VL and Gemma 4: the trainer must not count its tokens."""

    accepts_loss_kwargs = False


@pytest.mark.parametrize("model_class", [LlamaForCausalLM, PerMicroBatch])
def test_normalisation_is_that_of_trl(tmp_path, model_class):
    """With accumulation the answer tokens of the global batch, or of each micro-batch where the model asks for it."""
    settings = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1, "optim": "sgd", "max_steps": 4}
    runs = []
    for make, more in ((plain_trainer, {}), (echo_trainer, {"echo_p_start": 1e-12, "echo_p_end": 1e-12})):
        model = model_class(tiny_model().config)
        model.load_state_dict(tiny_model().state_dict())
        trainer = make(tmp_path / make.__name__, model=model, **settings, **more)
        trainer.train()
        runs.append(trainer)
    assert runs[1].echo is not None and runs[1].model_accepts_loss_kwargs == (model_class is LlamaForCausalLM)
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-6)
    for name, value in adapter(runs[0]).items():
        torch.testing.assert_close(adapter(runs[1])[name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_the_two_normalisations_differ(tmp_path):
    """Else the test above would see nothing."""
    both = []
    for model_class in (LlamaForCausalLM, PerMicroBatch):
        model = model_class(tiny_model().config)
        model.load_state_dict(tiny_model().state_dict())
        trainer = echo_trainer(
            tmp_path, model=model, gradient_accumulation_steps=4, per_device_train_batch_size=1, max_steps=1
        )
        trainer.train()
        both.append(losses(trainer)[0])
    assert abs(both[0] - both[1]) > 1e-3 * both[0]


def test_copies_of_the_config_keep_the_token(tmp_path):
    import copy

    args = EchoSFTConfig(output_dir=str(tmp_path), use_cpu=True, hub_token="hf_x")
    assert copy.copy(args).hub_token == copy.deepcopy(args).hub_token == "hf_x"


def test_metrics_survive_an_evaluation_in_the_same_step(tmp_path):
    trainer = echo_trainer(
        tmp_path,
        trainer_kwargs={"eval_dataset": Dataset.from_list(prompt_completion_rows(8, seed=5))},
        eval_strategy="epoch",
        logging_strategy="epoch",
        num_train_epochs=2,
        max_steps=-1,
    )
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entries and all("echo/ce_plain" in entry and "entropy" in entry for entry in entries)
