"""What is written where: checkpoints hold the echo networks beside the adapter, the final folder never does."""

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .network import site_key
from .portable import NotPortableError, make_portable
from .run_folder import write_run_folder
from .serving_adapter import AdapterError
from .serving_check import check_adapter
from .serving_rules import Verdict

logger = logging.getLogger(__name__)

ECHO_WEIGHTS = "echo_networks.safetensors"
TRAINING_ARGUMENTS = "training_args.bin"
RESUME_OPTIONS = (
    "bottleneck", "aggregation", "positions", "p_start", "p_end", "kd_weight", "kd_temperature", "teacher",
)  # fmt: skip
_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")


def is_checkpoint(folder: str | os.PathLike) -> bool:
    """Whether a folder is named like a checkpoint of the Trainer."""
    return bool(_CHECKPOINT.fullmatch(Path(folder).name))


def finish_adapter(folder: str, model: Any, portable: bool) -> None:
    """
    Bring a final adapter into the portable form, if asked, and say which engines would not serve it as trained.

    Args:
        folder: where PEFT has just saved the adapter.
        model: the PeftModel; only the shapes of its base are used.
        portable: whether to rewrite. What is not plain LoRA (DoRA, saved modules) keeps its form.
    """
    if not hasattr(model, "peft_config"):
        return
    base = model.get_base_model().config
    name = model.active_adapters[0]
    if name != "default":  # PEFT saves a named adapter in a folder of its name
        folder = os.path.join(folder, name)
    try:
        if portable:
            make_portable(folder, base)
    except NotPortableError as error:
        logger.warning("The adapter keeps its trained form: %s", error)
    except AdapterError as error:
        logger.error("The adapter in %s is damaged: %s", folder, error)
    report = check_adapter(folder, base=base)
    for engine, verdict in report.verdicts.items():
        if verdict in (Verdict.REFUSES, Verdict.SILENTLY_WRONG):
            rules = ", ".join(found.rule.name for found in report.for_engine(engine))
            logger.warning(
                "%s %s this adapter (%s); `echo-trainer check %s` says why.", engine, verdict, rules, folder
            )


class EchoCheckpointMixin:
    """Saving and loading for `EchoSFTTrainer`; relies on `self.echo` (an `EchoSetup`, or None with the echo off)."""

    echo: Any = None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save the echo networks with the optimizer state they belong to (skipped by `save_only_model`)."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.echo is None:
            return
        state = {name: _whole(value).cpu().contiguous() for name, value in self.echo.networks.state_dict().items()}
        if self.args.should_save:
            metadata = {"echo": json.dumps(self._echo_options())}
            save_file(state, os.path.join(output_dir, ECHO_WEIGHTS), metadata=metadata)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the echo networks before the optimizer state that belongs to them."""
        if checkpoint is not None and self.echo is not None:
            self._load_echo_networks(checkpoint)
        elif checkpoint is not None and os.path.isfile(os.path.join(checkpoint, ECHO_WEIGHTS)):
            raise ValueError(
                f"The checkpoint {checkpoint} was saved with the echo on, and this run has it off. Continue with the "
                f"echo_* options of that run, or start a new run from its adapter."
            )
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        """Load the best adapter, and its echo networks where the checkpoint holds them."""
        super()._load_best_model()
        best = self.state.best_model_checkpoint
        if self.echo is not None and best and os.path.isfile(os.path.join(best, ECHO_WEIGHTS)):
            self._load_echo_networks(best)

    def _load_echo_networks(self, checkpoint: str) -> None:
        path = os.path.join(checkpoint, ECHO_WEIGHTS)
        if not os.path.isfile(path):
            raise ValueError(
                f"The checkpoint {checkpoint} holds no {ECHO_WEIGHTS}, so the echo networks cannot go on from it. "
                f"It was saved with save_only_model=True or without the echo. Continue from another checkpoint, or "
                f"start a new run from its adapter: PeftModel.from_pretrained(model, {checkpoint!r}, "
                f"is_trainable=True)."
            )
        with safe_open(path, framework="pt") as file:
            saved = json.loads((file.metadata() or {}).get("echo", "{}"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
        options = self._echo_options()
        changed = [f"{k} was {saved.get(k)!r}, is {v!r}" for k, v in options.items() if saved.get(k) != v]
        if changed:
            raise ValueError(
                f"The checkpoint {checkpoint} belongs to other echo options: {'; '.join(changed)}. Continue with the "
                f"options it was saved with, or start a new run."
            )
        self.echo.networks.load_state_dict(state)

    def _echo_options(self) -> dict[str, Any]:
        """What must not change between stop and resume, since the echo networks were trained for it."""
        return {
            "source_layers": self.echo.source_layers,
            "targets": [site_key(site) for site in self.echo.sites],
            **{name: getattr(self.args, f"echo_{name}") for name in RESUME_OPTIONS},
            "seed": self.args.resolved_echo_seed,
        }

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save an ordinary PEFT adapter; outside checkpoints also the card and the record of the run."""
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        super()._save(output_dir, state_dict=state_dict)
        if not self.args.should_save:
            return
        # The pickle of the arguments is needed by nothing and would be uploaded with the adapter.
        Path(output_dir, TRAINING_ARGUMENTS).unlink(missing_ok=True)
        if not is_checkpoint(output_dir):
            finish_adapter(output_dir, self.model, portable=self.args.portable_adapter)
            write_run_folder(self, output_dir)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None
    ) -> None:
        """Write our model card and run record to `output_dir` (TRL calls this at every checkpoint and push)."""
        if self.is_world_process_zero():
            write_run_folder(self, self.args.output_dir, dataset_name=dataset_name)


def _whole(value: torch.Tensor) -> torch.Tensor:
    """A parameter that FSDP2 has sharded, gathered from all processes."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
