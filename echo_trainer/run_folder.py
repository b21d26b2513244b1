"""The finished run's folder: `echo_run.json` (record), `assets/*.png` (curves) and `README.md` (model card)."""

import json
import math
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ._version import __version__
from .card import render_card
from .config import TOKEN_FIELDS

RUN_RECORD = "echo_run.json"
_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "safetensors")


def write_run_folder(trainer: Any, folder: str, dataset_name: str | None = None) -> None:
    """
    Write record, curves and card of a run beside its adapter. The card comes last: PEFT rewrites README.md on save.

    Args:
        trainer: an `EchoSFTTrainer`.
        folder: where the adapter is.
        dataset_name: public id of the training data, if the caller knows it.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    record = _finite(run_record(trainer, dataset_name))
    text = json.dumps(record, indent=2, sort_keys=True, allow_nan=False)
    (path / RUN_RECORD).write_text(text + "\n", encoding="utf-8")
    curves = _write_curves(trainer.state.log_history, path / "assets")
    (path / "README.md").write_text(render_card(record, curves), encoding="utf-8")


def run_record(trainer: Any, dataset_name: str | None = None) -> dict[str, Any]:
    """Configuration, versions, data, metrics and provenance of a run, without tokens and without local paths."""
    args = trainer.args
    base_id = getattr(trainer.model.config, "_name_or_path", "") or None
    configs = getattr(trainer.model, "peft_config", {})
    peft_config = configs.get(trainer.model.active_adapters[0]) if configs else None
    return {
        "echo_trainer": __version__,
        "base_model": base_id if base_id and not Path(base_id).exists() else None,
        "base_model_type": trainer.model.config.model_type,
        "adapter": _adapter_record(peft_config),
        "echo": {
            "enabled": args.echo_enabled,
            "source_layers": trainer.echo.source_layers if trainer.echo else None,
            "target_layers": sorted({site.layer for site in trainer.echo.sites}) if trainer.echo else None,
            "pass": _echo_pass(trainer),
            **{name: getattr(args, name) for name in args.__dataclass_fields__ if name.startswith("echo_")},
        },
        "hyperparameters": _hyperparameters(args),
        "data": {"dataset": dataset_name, "n_train": _length(trainer.train_dataset), "max_length": args.max_length},
        "steps": {"done": trainer.state.global_step, "planned": trainer.state.max_steps, "epoch": trainer.state.epoch},
        "metrics": trainer.state.log_history,
        "versions": {"python": platform.python_version(), **_versions()},
        "device": trainer.args.device.type,
        "n_processes": args.world_size,
    }


def _echo_pass(trainer: Any) -> str | None:
    """How the echo pass was computed."""
    if trainer.echo is None:
        return None
    if not trainer.data_collator.suffix:
        return "full"
    fallback = trainer.data_collator.fallback
    return "suffix" if fallback is None else f"suffix; full for batches where {fallback}"


def _finite(value: Any) -> Any:
    """The value with NaN and infinity as text, which JSON cannot hold as numbers."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _adapter_record(config: Any) -> dict[str, Any] | None:
    if config is None:
        return None
    targets = config.target_modules
    return {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
        "target_modules": sorted(targets) if isinstance(targets, set | list | tuple) else targets,
    }


def _hyperparameters(args: Any) -> dict[str, Any]:
    """The training arguments that matter for a result and name no path."""
    names = (
        "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps", "weight_decay", "optim",
        "per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "seed", "data_seed", "bf16",
        "fp16", "gradient_checkpointing", "packing", "padding_free", "completion_only_loss", "assistant_only_loss",
    )  # fmt: skip
    values = {name: getattr(args, name) for name in names if hasattr(args, name) and name not in TOKEN_FIELDS}
    return {
        k: v if isinstance(v, int | float | bool | type(None)) else str(getattr(v, "value", v))
        for k, v in values.items()
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _length(dataset: Any) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None


def _write_curves(history: list[dict[str, Any]], folder: Path) -> list[str]:
    """Draw the training curves; names of the files written, relative to the run's folder."""
    steps = [entry for entry in history if "loss" in entry]
    if len(steps) < 2:
        return []
    # Imported here: pyplot takes a second, and only runs that have something to draw should pay it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axis = figure.subplots()
    for key, label in (("echo/ce_plain", "plain path"), ("echo/ce_echo", "echo pass"), ("loss", "training loss")):
        points = [(entry["step"], entry[key]) for entry in steps if key in entry]
        if points and not (key == "loss" and any("echo/ce_plain" in entry for entry in steps)):
            axis.plot(*zip(*points, strict=True), label=label, linewidth=1.4)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("cross-entropy per answer token")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "training.png", dpi=130)
    return ["assets/training.png"]
