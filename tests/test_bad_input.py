"""Bad input: an error before training starts that says what was received and what to write instead."""

import os

import pytest
import torch
from datasets import Dataset, IterableDataset
from models import lora_config, prompt_completion_rows, tiny_model, tiny_tokenizer
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from training import echo_trainer
from transformers import T5Config, T5ForConditionalGeneration
from trl import SFTConfig

from echo_trainer import EchoSFTConfig, EchoSFTTrainer, cli

CONFIG = [
    ({"echo_p_start": 1.5}, "not in [0, 1]"),
    ({"echo_p_start": -0.1}, "not in [0, 1]"),
    ({"echo_p_end": float("nan")}, "not in [0, 1]"),
    ({"echo_p_end": "0.5"}, "not in [0, 1]"),
    ({"echo_p_start": True}, "not in [0, 1]"),
    ({"echo_kd_temperature": 0}, "divides the logits"),
    ({"echo_kd_temperature": -1.0}, "divides the logits"),
    ({"echo_kd_temperature": float("inf")}, "divides the logits"),
    ({"echo_kd_weight": -1.0}, "push the two passes apart"),
    ({"echo_kd_weight": None}, "push the two passes apart"),
    ({"echo_bottleneck": 0}, "width of a layer"),
    ({"echo_bottleneck": 2.5}, "width of a layer"),
    ({"echo_aggregation": "max"}, "'mean', 'weighted'"),
    ({"echo_positions": "all"}, "'answer', 'predicting'"),
    ({"echo_teacher": "both"}, "'echo', 'plain', 'mutual'"),
    ({"echo_pass": "half"}, "'auto', 'suffix', 'full'"),
    ({"echo_learning_rate": 0.0}, "positive number"),
    ({"echo_learning_rate": "fast"}, "positive number"),
    ({"echo_seed": -1}, "at least 0"),
    ({"echo_seed": 1.5}, "at least 0"),
    ({"echo_source_layers": []}, "list of layer indices"),
    ({"echo_source_layers": "deep"}, "list of layer indices"),
    ({"echo_target_layers": [1.5]}, "list of layer indices"),
    ({"echo_target_layers": [1, 1]}, "names a layer twice"),
    ({"loss_type": "dft"}, "loss_type='nll'"),
    ({"label_smoothing_factor": 0.1}, "changes the targets of both passes"),
    ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "non-reentrant"),
    ({"torch_compile": True}, "compiled again each time"),
]


@pytest.mark.parametrize(("settings", "message"), CONFIG, ids=[str(settings) for settings, _ in CONFIG])
def test_config(tmp_path, settings, message):
    with pytest.raises(ValueError) as error:
        EchoSFTConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
    assert message in str(error.value)
    assert next(iter(settings)).split("_kwargs")[0] in str(error.value)


@pytest.mark.parametrize("settings", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}])
def test_options_of_trl_work_without_the_echo(tmp_path, settings):
    trainer = echo_trainer(tmp_path, echo_p_start=0, echo_p_end=0, max_steps=1, **settings)
    trainer.train()
    assert trainer.echo is None


def lora_on_layers(*layers):
    return LoraConfig(target_modules=["q_proj"], layers_to_transform=list(layers), layers_pattern="layers")


def encoder_decoder():
    return T5ForConditionalGeneration(T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2))


def without_answers():
    return Dataset.from_list([{"text": row["prompt"]} for row in prompt_completion_rows(8)])


def answers_only():
    return Dataset.from_list([{"input_ids": [3, 4, 5], "labels": [3, 4, 5]} for _ in range(8)])


def prompts_only():
    return Dataset.from_list([{"input_ids": [3, 4, 5], "labels": [-100] * 3} for _ in range(8)])


def stream_without_answers():
    return IterableDataset.from_generator(lambda: ({"text": row["prompt"]} for row in prompt_completion_rows(8)))


TRAINER = [
    ("text only", {"rows": without_answers}, "no boundary"),
    ("answers only", {"rows": answers_only}, "no boundary"),
    ("prompts only", {"rows": prompts_only, "max_length": None}, "no boundary"),
    ("stream of text", {"rows": stream_without_answers}, "no boundary"),
    ("too short for any answer", {"max_length": 3}, "max_length"),
    ("source below target", {"echo_source_layers": [1], "echo_target_layers": [3]}, "must lie below"),
    ("source is target", {"echo_source_layers": [2], "echo_target_layers": [2]}, "must lie below"),
    ("one target too deep", {"echo_source_layers": [3, 4], "echo_target_layers": [0, 3]}, "must lie below"),
    ("source outside", {"echo_source_layers": [5]}, "outside the model"),
    ("target outside", {"echo_target_layers": [-6]}, "outside the model"),
    ("same layer twice", {"echo_source_layers": [4, -1]}, "twice"),
    ("no LoRA in target", {"lora": lambda: lora_on_layers(3, 4)}, "hold no LoRA module"),
    ("trained bias", {"lora": lambda: lora_config(bias="all")}, "bias='none'"),
    ("lora bias", {"lora": lambda: lora_config(bias="lora_only")}, "bias='none'"),
    ("another adapter", {"lora": lambda: IA3Config(task_type="CAUSAL_LM")}, "IA3Config"),
    ("prompt tuning", {"lora": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)}, "LoraConfig"),
    ("loss function", {"trainer_kwargs": lambda: {"compute_loss_func": lambda *a, **k: 0}}, "compute_loss_func"),
    ("suffix impossible", {"echo_pass": "suffix", "model": lambda: dynamic_rope()}, "length of the sequence"),
    ("one layer", {"model": lambda: tiny_model(num_hidden_layers=1)}, "at least 2"),
]


def dynamic_rope():
    return tiny_model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})


@pytest.mark.parametrize(("settings", "message"), [row[1:] for row in TRAINER], ids=[row[0] for row in TRAINER])
def test_trainer(tmp_path, settings, message):
    made = {name: value() if callable(value) else value for name, value in settings.items()}
    with pytest.raises(ValueError) as error:
        echo_trainer(tmp_path / "out", **made)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")


def test_full_parameter_model(tmp_path):
    with pytest.raises(ValueError, match="without `peft_config`"):
        EchoSFTTrainer(
            model=tiny_model(),
            args=EchoSFTConfig(output_dir=str(tmp_path), use_cpu=True),
            train_dataset=Dataset.from_list(prompt_completion_rows(4)),
            processing_class=tiny_tokenizer(),
        )


def test_encoder_decoder(tmp_path):
    from echo_trainer.layers import decoder_layers

    with pytest.raises(ValueError, match="encoder-decoder"):
        decoder_layers(encoder_decoder())


def test_frozen_peft_model(tmp_path):
    model = get_peft_model(tiny_model(), lora_config())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="is_trainable=True"):
        EchoSFTTrainer(
            model=model,
            args=EchoSFTConfig(output_dir=str(tmp_path), use_cpu=True, gradient_checkpointing=False),
            train_dataset=Dataset.from_list(prompt_completion_rows(4)),
            processing_class=tiny_tokenizer(),
        )


def test_arguments_of_another_type(tmp_path):
    with pytest.raises(TypeError, match="EchoSFTConfig"):
        EchoSFTTrainer(model=tiny_model(), args={"output_dir": "x"}, train_dataset=None, peft_config=lora_config())


def test_echo_networks_of_other_options(tmp_path):
    echo_trainer(tmp_path / "a", save_strategy="steps", save_steps=3, max_steps=3).train()
    other = echo_trainer(tmp_path / "b", echo_bottleneck=16)
    with pytest.raises(ValueError, match="bottleneck was 64, is 16"):
        other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))


def test_lost_answers_are_counted_once(tmp_path, caplog):
    rows = [{"prompt": "w1 " * 20, "completion": " w2"}] * 3 + prompt_completion_rows(20)
    trainer = echo_trainer(tmp_path, rows=rows, max_length=18)
    lines = [record.getMessage() for record in caplog.records if "no answer left" in record.getMessage()]
    assert lines == [
        "3 of 23 examples of the train dataset have no answer left after truncation to max_length=18 and are dropped. "
        "Raise `max_length` to keep them."
    ]
    assert len(trainer.train_dataset) == 20


def test_unroutable_samples_are_counted(tmp_path):
    rows = [{"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6]}, {"input_ids": [3, 4], "labels": [3, 4]}] * 8
    trainer = echo_trainer(tmp_path, rows=rows, max_steps=4, per_device_train_batch_size=4)
    trainer.train()
    entries = trainer.state.log_history[:-1]
    assert entries[0]["echo/unroutable"] + entries[0]["echo/routed"] == 1  # p = 1 at the first step
    assert sum(entry["echo/unroutable"] for entry in entries) / 4 == 0.5  # one epoch, half of the rows


COMMAND_LINE = [
    (["nonsense"], "is no command"),
    (["sft", "--config", "no-such-recipe"], "neither a file nor one that ships"),
    (["sft", "--config"], "needs the name"),
    (["sft", "--output_dir", "x", "--use_cpu", "--model_name_or_path", "m"], "No dataset"),
    (["sft", "--output_dir", "x", "--use_cpu", "--dataset_name", "d"], "No model"),
    (["sft", "--output_dir", "x", "--use_cpu", "--echo_p_start", "2"], "not in [0, 1]"),
]


@pytest.mark.parametrize(("arguments", "message"), COMMAND_LINE, ids=[" ".join(a) for a, _ in COMMAND_LINE])
def test_command_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not os.listdir(tmp_path)


def test_unknown_recipe_key(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("output_dir: x\necho_layers: [1]\nuse_cpu: true\n")
    assert cli.main(["sft", "--config", str(recipe)]) == 2
    assert "echo_layers" in capsys.readouterr().err


def test_sft_config_gets_the_defaults_of_the_echo(tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, learning_rate=1e-3, report_to="none")
    trainer = EchoSFTTrainer(
        tiny_model(), args, None, Dataset.from_list(prompt_completion_rows(4)), None, tiny_tokenizer(),
        peft_config=lora_config(),
    )  # fmt: skip
    assert isinstance(trainer.args, EchoSFTConfig) and trainer.args.learning_rate == 1e-3
    assert trainer.echo is not None and torch.is_tensor(next(trainer.echo_networks.parameters()))
