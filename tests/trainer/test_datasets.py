"""Every form of dataset and of model that `SFTTrainer` takes trains with the echo."""

import pytest
from datasets import Dataset, IterableDataset
from models import adapted, conversation_rows, lora_config, prompt_completion_rows, tiny_model, tiny_tokenizer
from training import echo_trainer, losses

from echo_trainer import EchoSFTConfig, EchoSFTTrainer


def conversational_prompt_completion():
    return [
        {"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in conversation_rows(24, turns=1)
    ]


def pre_tokenised():
    return [{"input_ids": [3 + i, 4, 5, 6, 7], "labels": [-100, -100, 5, 6, 7]} for i in range(24)]


def stream():
    return IterableDataset.from_generator(lambda: iter(prompt_completion_rows(24)))


FORMS = {
    "prompt-completion": (lambda: prompt_completion_rows(24), {}),
    "conversational prompt-completion": (conversational_prompt_completion, {}),
    "messages": (lambda: conversation_rows(24), {"assistant_only_loss": True}),
    "pre-tokenised": (pre_tokenised, {}),
    "stream": (stream, {}),
    "padding-free": (lambda: prompt_completion_rows(24), {"padding_free": True, "max_length": None}),
    "packed": (lambda: prompt_completion_rows(96), {"packing": True, "max_length": 48}),
    "packed, split": (
        lambda: prompt_completion_rows(96),
        {"packing": True, "max_length": 48, "packing_strategy": "bfd_split"},
    ),
    "packed, wrapped": (
        lambda: prompt_completion_rows(96),
        {"packing": True, "max_length": 48, "packing_strategy": "wrapped"},
    ),
    "padded to a multiple": (lambda: prompt_completion_rows(24), {"pad_to_multiple_of": 16}),
    "grouped by length": (lambda: prompt_completion_rows(24), {"train_sampling_strategy": "group_by_length"}),
    "not the last batch": (lambda: prompt_completion_rows(22), {"num_train_epochs": 1, "max_steps": -1}),
}


@pytest.mark.parametrize("echo_pass", ["suffix", "full"])
@pytest.mark.parametrize("form", FORMS)
def test_datasets(tmp_path, form, echo_pass):
    rows, settings = FORMS[form]
    settings = {"max_steps": 3, "echo_p_end": 1.0, "echo_pass": echo_pass, **settings}
    trainer = echo_trainer(tmp_path, rows=rows(), **settings)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == (6 if "num_train_epochs" in settings else 3)
    for entry in entries:
        assert entry["echo/routed"] + entry["echo/unroutable"] == pytest.approx(1)
        assert entry["echo/routed"] > 0
    assert entries[-1]["echo/ce_echo"] != entries[-1]["echo/ce_plain_routed"]


def test_suffix_and_full_train_alike_on_every_form(tmp_path):
    for form in ("messages", "packed", "padding-free"):
        rows, settings = FORMS[form]
        runs = []
        for echo_pass in ("suffix", "full"):
            trainer = echo_trainer(tmp_path / echo_pass, rows=rows(), echo_pass=echo_pass, optim="sgd", **settings)
            trainer.train()
            runs.append(losses(trainer))
        assert runs[0] == pytest.approx(runs[1], rel=1e-5), form


def test_peft_model_is_taken_as_it_is(tmp_path):
    model = adapted(tiny_model())
    trainer = EchoSFTTrainer(
        model=model,
        args=EchoSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, max_steps=2, report_to="none"),
        train_dataset=Dataset.from_list(prompt_completion_rows(8)),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    assert trainer.model is model


def test_bfloat16_is_the_default_as_in_trl(tmp_path):
    trainer = echo_trainer(tmp_path, bf16=True, max_steps=2)
    trainer.train()
    assert all(parameter.dtype.is_floating_point for parameter in trainer.echo_networks.parameters())
    assert len(losses(trainer)) == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"neftune_noise_alpha": 5.0},
        {"average_tokens_across_devices": False},
        {"max_grad_norm": 0.0},
        {"auto_find_batch_size": True},
        {"include_num_input_tokens_seen": "all"},
        {"lora": lora_config(use_rslora=True)},
        {"lora": lora_config(modules_to_save=["lm_head"])},
        {"lora": lora_config(layers_to_transform=[1, 2], layers_pattern="layers", target_modules=["q_proj"])},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_options_of_trl_keep_working(tmp_path, settings):
    trainer = echo_trainer(tmp_path, max_steps=2, **settings)
    trainer.train()
    assert len(losses(trainer)) == 2
