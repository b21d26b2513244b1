"""Refuse what cannot work, before training starts and before anything is written, in plain words.

Each check says what was received, why it cannot work and what to write instead.
"""

import itertools
import logging
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig, PeftModel
from peft.utils import PeftType
from torch import nn
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as TEXT_COLLATOR

from ..adapter.find_variants import unrepeated_init_of
from ..compat.trainer import sends_batches
from ..method.segments import has_boundary
from ..passes.step import ECHO_MODULE
from ..rendering.forms import FORMATS

logger = logging.getLogger(__name__)

STREAM_PROBE = 1000
"""Examples of a stream that are looked at for an answer after a prompt."""

OFF = "or switch the echo off with echo_p_start=0 and echo_p_end=0"


def check_arguments(model: Any, peft_config: Any, compute_loss_func: Any) -> None:
    """
    What can be refused before a model is loaded.

    Raises:
        ValueError: full-parameter training, an adapter that is not LoRA, trained biases, or a loss function.
    """
    if compute_loss_func is not None:
        raise ValueError(
            "`compute_loss_func` was given, but Echo-LoRA computes its own loss from two passes, so the function "
            f"would never be called for them. Leave it out, {OFF}."
        )
    if peft_config is None and not isinstance(model, PeftModel):
        name = model if isinstance(model, str) else type(model).__name__
        raise ValueError(
            f"The model {name!r} came without `peft_config`, which means training all of its parameters. Echo-LoRA "
            f"trains LoRA or DoRA adapters: pass peft_config=LoraConfig(r=16, lora_alpha=32, "
            f"target_modules='all-linear'), or a PeftModel, {OFF}."
        )
    if isinstance(model, PeftModel):
        for config in model.peft_config.values():
            _check_adapter(config)
    elif peft_config is not None:
        _check_adapter(peft_config)


def _check_adapter(config: Any) -> None:
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        raise ValueError(
            f"The adapter is configured by {type(config).__name__}; Echo-LoRA adds the echo to LoRA modules (LoRA, "
            f"DoRA and rsLoRA). Use a LoraConfig, {OFF}."
        )
    if getattr(config, "alora_invocation_tokens", None):
        raise ValueError(
            "`alora_invocation_tokens` makes an activated LoRA, whose position PEFT looks up in a forward of its own. "
            f"Echo-LoRA runs the model's layers directly, so the adapter would never be active. Leave it out, {OFF}."
        )
    if unrepeated := unrepeated_init_of(config.to_dict()):
        raise ValueError(
            f"`init_lora_weights={unrepeated!r}` takes something out of the base's weights, and PEFT does not take "
            f"the same out again when it loads the adapter (pissa_niter draws random numbers, corda wants its data "
            f"again). What is saved would not be what was trained. Use 'pissa', 'olora' or True, {OFF}."
        )
    if config.bias != "none":
        raise ValueError(
            f"`bias={config.bias!r}` of the LoraConfig trains biases of the base, and no serving engine loads trained "
            f"biases. Use bias='none', {OFF}."
        )


def check_model(model: nn.Module, accelerator: Any, detach: bool) -> None:
    """
    What can be refused once model and accelerator exist.

    Args:
        model: with its adapter.
        accelerator: of the trainer.
        detach: `echo_detach`.

    Raises:
        ValueError: weights that are fetched for every pass, no trainable adapter, more than one, weights that no
            adapter saves, FSDP1, activation checkpointing by FSDP, sharded sequences or matrices, or a gradient
            through the echo under DeepSpeed.
    """
    _check_devices(getattr(model, "hf_device_map", None) or {}, accelerator.device)
    if not any("lora_" in name and parameter.requires_grad for name, parameter in model.named_parameters()):
        raise ValueError(
            "The PeftModel has no trainable LoRA parameter. Load it with PeftModel.from_pretrained(model, adapter, "
            "is_trainable=True)."
        )
    _check_what_is_trained(model)
    if not detach and accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            "`echo_detach=False` was never run with DeepSpeed, whose sums depend on the order in which gradients "
            "arrive, and the echo's gradient through the plain pass changes that order. Use DDP or FSDP2, or set "
            "echo_detach=True."
        )
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp is not None and fsdp.activation_checkpointing:
        raise ValueError(
            "`fsdp_activation_checkpointing` replays layers without the echo that was added to them, which gives "
            "wrong gradients. Set it to false in the accelerate config and use `gradient_checkpointing=True` of the "
            "training arguments."
        )
    if fsdp is not None and fsdp.fsdp_version == 1:
        raise ValueError(
            "`fsdp_version: 1` flattens the frozen base, the adapter and the echo networks into common parameters, "
            "with which Echo-LoRA was never run. Write `fsdp_version: 2` in the accelerate config "
            "(recipes/accelerate/fsdp2.yaml is one)."
        )
    parallelism = getattr(accelerator, "parallelism_config", None)
    if parallelism is not None:
        for option in ("cp_enabled", "sp_enabled", "tp_enabled"):
            if getattr(parallelism, option, False):
                raise ValueError(
                    f"The parallelism config has {option.removesuffix('_enabled')!r} enabled. It splits sequences or "
                    f"matrices over processes, and the echo needs the boundary of a prompt and its answer in one "
                    f"place. Use data parallelism (DDP, FSDP2, DeepSpeed ZeRO), {OFF}."
                )


def _check_devices(device_map: dict[str, Any], device: torch.device) -> None:
    """Refuse a model that does not lie on devices as a whole; it may lie on several of them."""
    fetched = {name: str(place) for name, place in device_map.items() if str(place) in ("cpu", "disk")}
    if device.type == "cpu":
        fetched = {name: place for name, place in fetched.items() if place == "disk"}
    if fetched:
        name, place = next(iter(fetched.items()))
        raise ValueError(
            f"`device_map` has left {name!r} on {place!r}: its weights are fetched for every pass and gone when "
            f"gradients are computed. Use a model that fits: load it in 4 bits (load_in_4bit), split it over more "
            f"GPUs with device_map='auto', or shard it with FSDP2 or ZeRO-3 (recipes/accelerate), {OFF}."
        )


def check_batches(accelerator: Any, padding_free: bool) -> None:
    """
    Refuse batches that one process cannot collate for all.

    Args:
        accelerator: of the trainer.
        padding_free: whether batches are single rows of several documents.

    Raises:
        ValueError: they are, and are to be sent to other processes.
    """
    if padding_free and sends_batches(accelerator) and accelerator.num_processes > 1:
        raise ValueError(
            "`dispatch_batches=True` has one process collate for all of them and cuts its batch up by rows, and a "
            "padding-free batch (`padding_free`, or `packing` with strategy 'bfd') is a single row. Write "
            "accelerator_config={'dispatch_batches': False}: each process then collates its own share of the data."
        )


def _check_what_is_trained(model: Any) -> None:
    """Refuse weights that would be trained and not be saved, and adapters that are trained together."""
    if len(model.active_adapters) > 1:
        raise ValueError(
            f"The adapters {', '.join(model.active_adapters)} are active together, so what is trained would be right "
            f"with all of them only. Make one of them active with model.set_adapter(NAME); to train on top of "
            f"another, merge that into the base first with model.merge_and_unload()."
        )
    saved = ("lora_", ".modules_to_save.", ".token_adapter.")
    lost = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and not any(part in f".{name}" for part in saved)
    ]
    lost = [name for name in lost if not name.startswith(f"{ECHO_MODULE}.")]
    if lost:
        raise ValueError(
            f"{len(lost)} weights of the base itself are trainable, such as {lost[0]!r}. The adapter would not hold "
            f"them, so what is saved would not be what was trained. Name their modules in `modules_to_save` of the "
            f"LoraConfig, or freeze them: parameter.requires_grad_(False)."
        )


def check_dataset(dataset: Any, collator: Any) -> None:
    """
    Refuse a prepared dataset in which no answer follows a prompt.

    Looks at examples until one has an answer after a prompt: the first, for a dataset in the right format. Of a stream
    it looks at the first 1,000 examples only. What another collator than TRL's makes of the examples is not known, so
    they are not checked then; `first_step.py` looks at its batches.

    Raises:
        ValueError: no example has a prompt/answer boundary, or they are no token ids.
    """
    if type(collator) is not TEXT_COLLATOR:
        return
    seen = 0
    examples = dataset if isinstance(dataset, Dataset) else itertools.islice(iter(dataset), STREAM_PROBE)
    example: Any
    for example in examples:
        if "input_ids" not in example:
            raise ValueError(
                f"The training dataset has the columns {sorted(example)} and no `input_ids`: it is made into tokens "
                f"where the trainer is made, and this one was set later, or `skip_prepare_dataset` left it as it was. "
                f"Give it to the trainer as `train_dataset`, or tokenise it before."
            )
        if "labels" in example and has_boundary(example):
            return
        seen += 1
    if not seen:
        raise ValueError(
            "The training dataset has no rows left to train on: it was empty, or every row lost its whole answer to "
            "truncation (raise `max_length`), or no row has a token that counts for the loss."
        )
    raise ValueError(
        f"None of the {seen} training examples looked at has an answer that follows a prompt, so there is no boundary "
        f"to take an echo from. {FORMATS} If the format is one of these, `max_length` may be too short to leave any "
        f"answer."
    )


def warn_of_lost_answers(name: str, before: int, after: int, max_length: int | None) -> None:
    """Say once how many examples lost their whole answer to truncation (TRL drops them without a word)."""
    if before > after:
        logger.warning(
            "%d of %d examples of the %s dataset have no answer left after truncation to max_length=%s and are "
            "dropped. Raise `max_length` to keep them.",
            before - after,
            before,
            name,
            max_length,
        )
