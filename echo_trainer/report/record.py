"""What is written down about a run: configuration, data, metrics, cost and provenance; no token and no local path."""

import dataclasses
import platform
import re
import subprocess
import sys
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .._version import __version__
from ..adapter.vocabulary import rows_of_config
from ..compat.identity import commit_of, fingerprint_of, name_of
from ..files import id_from_cache, is_local
from ..options import TOKEN_FIELDS
from ..resources import QUICKSTART_BASE
from .prompt_format import example, prompt_format

_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "safetensors")
_ALWAYS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps", "weight_decay", "optim",
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "seed", "data_seed", "bf16",
    "fp16", "gradient_checkpointing", "packing", "padding_free", "completion_only_loss", "assistant_only_loss",
)  # fmt: skip
# They name a place, a person or the looks of the run, not how it was trained.
_NEVER = re.compile(r"hub_|_dir$|_path$|^run_name|^report_to|^project|trackio|_file$|^disable_tqdm|^log|^push_to|"
                    r"^resume_|^save_|^echo_|^_|kwargs$|^do_|^use_cpu|^chat_template|"
                    r"^dataset_text|^card_")  # fmt: skip


def common_record(trainer: Any, dataset_name: str | None, seconds_before: float, tokens: int | None) -> dict[str, Any]:
    """
    What is written down about every run.

    Args:
        trainer: of transformers.
        dataset_name: public id of the training data, if the caller knows it.
        seconds_before: spent on training before the resume that this process began with.
        tokens: of the whole run, prompts included.
    """
    configs = getattr(trainer.model, "peft_config", {})
    peft_config = configs.get(trainer.model.active_adapters[0]) if configs else None
    return {
        "echo_trainer": __version__,
        **_base(trainer.model),
        "adapter": _adapter(peft_config),
        "hyperparameters": hyperparameters(trainer.args),
        "data": {
            "dataset": None if is_local(dataset_name) else dataset_name,
            "n_train": length(trainer.train_dataset),
            "n_eval": length(trainer.eval_dataset),
            "fingerprint": fingerprint_of(trainer.train_dataset),
            "revision": _data_revision(trainer.train_dataset),
        },
        "steps": {
            "done": trainer.state.global_step,
            "planned": trainer.state.max_steps,
            "epoch": trainer.state.epoch,
            "adapter": trainer.state.global_step,
            "best_by": None,
        },
        "metrics": trainer.state.log_history,
        "compute": _compute(trainer, seconds_before, tokens),
        "versions": {"python": platform.python_version(), **_versions()},
        "git": _git(),
        "device": trainer.args.device.type,
        "n_processes": trainer.args.world_size,
    }


def run_record(trainer: Any, dataset_name: str | None = None) -> dict[str, Any]:
    """
    The record of a run so far.

    Args:
        trainer: an `EchoSFTTrainer`.
        dataset_name: public id of the training data, if the caller knows it.
    """
    args, second = trainer.args, trainer.distillation
    # What a teacher wrote, and prompts nobody answered, are not shown: of a second training the labelled rows are.
    data = (trainer.train_dataset if second is None else second.labelled, trainer.processing_class)
    before = trainer.spent.before
    record = common_record(trainer, dataset_name, before.seconds, trainer.spent.tokens)
    record["steps"]["continued_from"] = before.step
    record["data"] |= {
        "n_train": length(data[0]),
        "n_held_out": length(trainer.held_out.rows),
        "max_length": args.max_length,
    }
    best = trainer.checkpoints.weights_of_step
    if best:
        record["steps"] |= {"adapter": best, "best_by": args.metric_for_best_model}
    return {
        **record,
        "echo": {
            "enabled": args.echo_enabled,
            "source_layers": trainer.echo.source_layers if trainer.echo else None,
            "target_layers": sorted({site.layer for site in trainer.echo.sites}) if trainer.echo else None,
            "pass": _echo_pass(trainer),
            "proof": trainer.pass_choice.records() if trainer.pass_choice else None,
            "seen": trainer.echo_metrics.seen if trainer.echo else None,
            "probation": trainer.probation.record(),
            **{name: getattr(args, name) for name in args.__dataclass_fields__ if name.startswith("echo_")},
        },
        "distillation": second.record if second is not None else None,
        "rows": (second.rows if second is not None else None) or trainer.rows.record(),
        "prompt_format": None if args.card_prompt == "none" else prompt_format(*data),
        "example": example(*data) if args.card_prompt == "example" else None,
    }


def hyperparameters(args: Any) -> dict[str, Any]:
    """The training arguments that matter most, and every other one that is not at its default; none names a path."""
    values = {name: getattr(args, name) for name in _ALWAYS if hasattr(args, name)}
    for field in dataclasses.fields(args):
        default = field.default if field.default is not dataclasses.MISSING else None
        value = getattr(args, field.name)
        if field.name in values or field.name in TOKEN_FIELDS or _NEVER.search(field.name):
            continue
        if isinstance(value, int | float | str) and value != default and "/" not in str(value):
            values[field.name] = value
    return {
        k: v if isinstance(v, int | float | bool | type(None)) else str(getattr(v, "value", v))
        for k, v in values.items()
    }


def _base(model: Any) -> dict[str, Any]:
    name = name_of(model.config)
    found = {"base_model": None, "base_model_type": model.config.model_type, "base_revision": None, "license": None,
             "base_is_quickstart": bool(name) and Path(name).resolve() == QUICKSTART_BASE}  # fmt: skip
    hub_id = id_from_cache(name) or (None if is_local(name) else name)
    if hub_id:
        found |= {"base_model": hub_id, "base_revision": commit_of(model.config)}
    embedding, rows = model.get_input_embeddings(), rows_of_config(model.config)
    present = getattr(getattr(embedding, "weight", None), "shape", (rows,))[0]
    found["resized_vocabulary"] = present if rows is not None and present != rows else None
    # The quickstart's base is part of this package.
    found["license"] = "apache-2.0" if found["base_is_quickstart"] else _license(hub_id, None if hub_id else name)
    return found


@lru_cache(maxsize=32)
def _license(hub_id: str | None, folder: str | None) -> str | None:
    """The license on the base's card: in its folder, in the cache, or on the Hub; None where none of them says."""
    from huggingface_hub import HfApi, ModelCard, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_OFFLINE

    card = Path(folder, "README.md") if folder else try_to_load_from_cache(hub_id, "README.md") if hub_id else None
    try:
        if isinstance(card, str | Path) and Path(card).is_file():
            return ModelCard.load(card).data.get("license")
        if hub_id and not HF_HUB_OFFLINE:
            data = HfApi().model_info(hub_id, timeout=5).card_data
            return data.license if data else None
    except Exception:
        # A card is worth having without it, and nothing here may end a finished training.
        return None
    return None


def _adapter(config: Any) -> dict[str, Any] | None:
    if config is None:
        return None
    names = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform")
    plain = ("r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "bias")
    values = {name: getattr(config, name) for name in plain}
    for name in names:
        value = getattr(config, name, None)
        values[name] = sorted(value) if isinstance(value, set | list | tuple) else value
    return {k: v for k, v in values.items() if v is not None}


def _echo_pass(trainer: Any) -> str | None:
    """How the echo pass was computed; None with the echo off, and before the first step."""
    if trainer.pass_choice is None or not trainer.pass_choice.verdicts:
        return None
    verdicts = trainer.pass_choice.verdicts.values()
    forms = dict.fromkeys(str(verdict.form) for verdict in verdicts)
    if len(forms) == 1:
        return next(iter(forms))
    return "; ".join(f"{verdict.form} for {verdict.kind}" for verdict in verdicts)


def _compute(trainer: Any, seconds_before: float, tokens: int | None) -> dict[str, Any]:
    """What the run cost, as far as it was measured, the parts before its resumes included."""
    import torch

    last = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    runtime = last.get("train_runtime")  # of the part after a resume
    found = {"seconds": runtime and seconds_before + runtime, "tokens": tokens or None}
    if trainer.args.device.type == "cuda":
        found |= {
            "device_name": torch.cuda.get_device_name(trainer.args.device),
            "peak_memory_bytes": torch.cuda.max_memory_allocated(trainer.args.device),
        }
    else:
        found |= {"device_name": f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"}
    return found


def _data_revision(dataset: Any) -> str | None:
    """The commit of a dataset of the Hub, from the addresses of the files it was made of."""
    checksums = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
    found = {match[1] for url in checksums if (match := re.search(r"@([0-9a-f]{40})/", url))}
    return found.pop() if len(found) == 1 else None


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@lru_cache(maxsize=1)
def _git() -> dict[str, Any] | None:
    """Commit of the project that the training script belongs to, and whether it had changes; None outside of git."""
    script = Path(sys.argv[0] or ".")
    if script.name in ("echo-trainer", "__main__.py", "accelerate", "torchrun") or not script.is_file():
        script = Path.cwd() / "run"  # a command of a package: the project is where it was called

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=script.parent, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return {"commit": commit, "changed": bool(git("status", "--porcelain", "-uno"))} if commit else None


def length(dataset: Any) -> Any:
    """Rows of a dataset, by split where it has some; None of a stream."""
    if isinstance(dataset, dict):
        return {name: length(part) for name, part in dataset.items()}
    return len(dataset) if hasattr(dataset, "__len__") else None
