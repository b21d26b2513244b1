"""Where a run continues, and whether it is still the same run: the facts a checkpoint is compared with."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..manifest import read_manifest
from .checkpoint_files import checkpoints, damage, last_whole_checkpoint
from .gathering import gathered

logger = logging.getLogger(__name__)

SAMPLES = 16
"""Values of each frozen parameter that enter the fingerprint of the base."""


def run_facts(trainer: Any) -> dict[str, Any]:
    """
    What must not change, or not unnoticed, between stop and resume. JSON values.

    | fact | if another on resume |
    |---|---|
    | `adapter`, `echo_learning_rate` | refused: another function, or another optimizer state |
    | `learning_rate` | announced: it is restored with the optimizer |
    | `base_shapes` | refused: the adapter does not fit |
    | `global_batch` | refused: the data would be skipped to another place, and routes are drawn by place |
    | `base_values` | announced: an adapter goes on from a base it was not trained on |
    | `processes` | announced: equal up to rounding and dropout only |
    | `planned_steps` | announced: schedules of learning rate and routing change |
    | `rows` | announced: another dataset |
    """
    args = trainer.args
    batch = trainer.state.train_batch_size or args.train_batch_size
    return {
        "step": trainer.state.global_step,
        "planned_steps": trainer.state.max_steps,
        "processes": args.world_size,
        "global_batch": args.world_size * batch * args.gradient_accumulation_steps,
        "rows": len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else None,
        "adapter": _adapter(trainer.model),
        "learning_rate": args.learning_rate,
        "echo_learning_rate": args.echo_learning_rate,
        **trainer.base_fingerprint,
    }


def _adapter(model: nn.Module) -> dict[str, Any]:
    """What makes an adapter another function, or another set of tensors."""
    config = getattr(model, "peft_config", {}).get(getattr(model, "active_adapter", None))
    names = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_dora", "use_rslora")
    values = {name: getattr(config, name) for name in names if hasattr(config, name)}
    return {name: sorted(value) if isinstance(value, set | list) else value for name, value in values.items()}


@torch.no_grad()
def base_fingerprint(model: nn.Module) -> dict[str, str]:
    """
    Two hashes of the frozen parameters of a model: of their names and shapes, and of a few values of each.

    The same for a model that was sharded while it was loaded (ZeRO-3, FSDP2): its parameters are gathered, one at a
    time, and every process must call this. Parameters that hold no values in this process do not count.
    """
    shapes, values = hashlib.sha256(), hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "lora_" in name:
            continue
        with gathered([parameter]) as (whole,):
            shapes.update(f"{name} {tuple(whole.shape)}\n".encode())
            if whole.numel() and not whole.is_meta:
                flat = whole.reshape(-1)
                some = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES]
                values.update(f"{some.dtype} {some.cpu().double().tolist()}\n".encode())
    return {"base_shapes": shapes.hexdigest(), "base_values": values.hexdigest()}


def find_checkpoint(output_dir: str, wanted: str | bool | None) -> str | None:
    """
    The checkpoint to continue from.

    Args:
        output_dir: folder of the run.
        wanted: as `resume_from_checkpoint` of `Trainer.train`: a folder; True (or "true", "last") for the last whole
            one, with a warning that names damaged ones after it; False or None for none.

    Raises:
        ValueError: there is none, or the one that was named is damaged.
    """
    if isinstance(wanted, str) and wanted.lower() in ("true", "last", "false"):
        wanted = wanted.lower() != "false"
    if wanted is None or wanted is False:
        return None
    if wanted is True:
        found, broken = last_whole_checkpoint(output_dir)
        for name, why in broken.items():
            logger.warning("The checkpoint %s in %s is damaged (%s) and is passed over.", name, output_dir, why)
        if found is None:
            raise ValueError(
                f"No valid checkpoint found in output directory ({output_dir}): "
                f"{'all are damaged: ' + ', '.join(broken) if broken else 'it holds none'}. Start the run anew, "
                f"without resume_from_checkpoint."
            )
        if broken:
            logger.warning("The run continues from %s.", found)
        return str(found)
    return _named_checkpoint(output_dir, str(wanted))


def _named_checkpoint(output_dir: str, wanted: str) -> str:
    if not Path(wanted).is_dir():
        there = ", ".join(path.name for path in checkpoints(output_dir)) or "none"
        raise ValueError(
            f"Can't find a valid checkpoint at {wanted}: there is no such folder. Checkpoints in {output_dir}: "
            f"{there}. resume_from_checkpoint=True takes the last whole one."
        )
    why = damage(wanted)
    if why is not None:
        whole, _ = last_whole_checkpoint(Path(wanted).resolve().parent)
        instead = f"Continue from {whole}" if whole else "There is no whole one beside it; start the run anew"
        raise ValueError(f"The checkpoint {wanted} is damaged: {why}. {instead}.")
    return wanted


def check_same_run(checkpoint: str, now: dict[str, Any]) -> None:
    """
    Compare a checkpoint with the run that is to continue from it.

    Args:
        checkpoint: a folder from `find_checkpoint`.
        now: `run_facts` of the run that continues, or those of them that are known.

    Raises:
        ValueError: the adapter, the rate of the echo, the base's parameters or the global batch are others.
    """
    then = read_manifest(checkpoint)
    if then is None:
        logger.warning(
            "%s was not saved by EchoSFTTrainer, so nothing tells whether model, data and batches are the same.",
            checkpoint,
        )
        return

    def changed(fact: str) -> bool:
        return fact in now and fact in then and then[fact] != now[fact]  # another version may have kept fewer facts

    for name, value in now.get("adapter", {}).items():
        if then["adapter"].get(name) != value:
            raise ValueError(
                f"The checkpoint {checkpoint} belongs to another adapter: {name} was {then['adapter'].get(name)!r} "
                f"and is {value!r}. Continue with the LoraConfig it was saved with, or start a new run."
            )
    if changed("echo_learning_rate"):
        raise ValueError(
            f"The checkpoint {checkpoint} was saved with echo_learning_rate={then['echo_learning_rate']!r}, and this "
            f"run has {now['echo_learning_rate']!r}. The optimizer's state holds the old one. Continue with it, or "
            f"start a new run."
        )
    if changed("base_shapes"):
        raise ValueError(
            f"The checkpoint {checkpoint} belongs to another base model: its parameters have other names or shapes. "
            f"Load the model it was trained on, or start a new run in another output_dir."
        )
    if changed("global_batch"):
        raise ValueError(
            f"The checkpoint {checkpoint} was written with a global batch of {then['global_batch']} samples "
            f"({then.get('processes', '?')} processes), and this run has {now['global_batch']} ({now['processes']} "
            f"processes). "
            f"Data and routes would go on at another place. Choose per_device_train_batch_size and "
            f"gradient_accumulation_steps so that processes x batch x accumulation is {then['global_batch']} again."
        )
    for fact, consequence in _ANNOUNCED.items():
        if changed(fact):
            shown = "" if fact == "base_values" else f" It was {then[fact]} and is {now[fact]}."
            logger.warning("Resuming from %s: %s%s", checkpoint, consequence, shown)


_ANNOUNCED = {
    "learning_rate": "the learning rate changed, and the old one stays: it is part of the optimizer's state.",
    "base_values": "the base model has other weights or another dtype than the adapter was trained on so far.",
    "processes": "the number of processes changed; routes stay the same, but losses agree up to rounding and dropout.",
    "planned_steps": "the planned number of steps changed, and with it the schedules of learning rate and routing.",
    "rows": "the training data has another number of rows, so other samples follow than would have.",
}
