"""Train tiny models with `EchoSFTTrainer` and `SFTTrainer` on the same data."""

import torch
from datasets import Dataset
from models import conversation_rows, lora_config, prompt_completion_rows, tiny_model, tiny_tokenizer
from trl import SFTConfig, SFTTrainer

from echo_trainer import EchoSFTConfig, EchoSFTTrainer

SETTINGS = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "learning_rate": 5e-3,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 1,
}


def echo_trainer(folder, *, rows=None, model=None, lora=None, trainer_kwargs=None, **settings):
    """An `EchoSFTTrainer` on a tiny model."""
    return _build(EchoSFTTrainer, EchoSFTConfig, folder, rows, model, lora, trainer_kwargs, settings)


def plain_trainer(folder, *, rows=None, model=None, lora=None, trainer_kwargs=None, **settings):
    """An `SFTTrainer` with the same model, adapter and data."""
    return _build(SFTTrainer, SFTConfig, folder, rows, model, lora, trainer_kwargs, settings)


def _build(trainer_class, config_class, folder, rows, model, lora, trainer_kwargs, settings):
    rows = prompt_completion_rows(40) if rows is None else rows
    return trainer_class(
        model=tiny_model() if model is None else model,
        args=config_class(output_dir=str(folder), **{**SETTINGS, **settings}),
        train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
        peft_config=lora_config(init_lora_weights=True) if lora is None else lora,
        **{"processing_class": tiny_tokenizer(), **(trainer_kwargs or {})},
    )


DATA_FORMS = {
    "padded": ({}, lambda: prompt_completion_rows(40)),
    "multi-turn": ({"assistant_only_loss": True}, lambda: conversation_rows(40)),
    "packed": ({"packing": True, "max_length": 64}, lambda: prompt_completion_rows(160)),
}


def all_parameters(trainer):
    """Parameters by name, copied, with the echo networks wherever they are."""
    parameters = dict(trainer.model.named_parameters())
    if getattr(trainer, "echo", None) is not None:  # not a part of the model
        parameters |= {f"echo_networks.{n}": p for n, p in trainer.echo_networks.named_parameters()}
    return {n: p.detach().clone().requires_grad_(p.requires_grad) for n, p in parameters.items()}


def trainable(trainer):
    """Trainable parameters by name, copied."""
    return {n: p.detach() for n, p in all_parameters(trainer).items() if p.requires_grad}


def adapter(trainer):
    """The adapter's parameters by name, copied; without the echo networks."""
    return {n: p for n, p in trainable(trainer).items() if "lora_" in n}


def losses(trainer):
    """Logged training losses, one a step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]):
    """Bit-identical tensors under identical names."""
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, f"{len(different)} of {len(left)} tensors differ, such as {different[:3]}"


def revive(trainer):
    """Give P2 values other than zero, so that the echo changes the outputs from the first step on."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trainer.echo_networks.named_parameters():
        if name.endswith("project_out"):
            parameter.data = torch.randn(parameter.shape, generator=generator)
