"""Checkpoints of a run, with the echo networks beside the adapter, and the way back from them."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from typing import Any

from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from ..manifest import write_manifest
from ..method.sites import site_key
from .checkpoint_files import STAGING, bring_back, damage, publish, rotate
from .full_disk import clean_failure
from .gathering import load_whole_state, whole_state
from .resume import check_same_run, find_checkpoint, run_facts

logger = logging.getLogger(__name__)

ECHO_WEIGHTS = "echo_networks.safetensors"
RESUME_OPTIONS = (
    "bottleneck", "aggregation", "positions", "p_start", "p_end", "kd_weight", "kd_temperature", "teacher",
)  # fmt: skip


class EchoCheckpointMixin:
    """Saving and loading for `EchoSFTTrainer`; relies on `self.echo` (an `EchoSetup`, or None with the echo off)."""

    echo: Any = None
    _push_after_publishing: Callable[[], None] | None = None
    _weights_of_step: int | None = None  # an earlier step than the last, where the best model was loaded

    # Checkpoints

    def write_checkpoint(self, write: Callable[[], None], run_dir: str) -> None:
        """Save a checkpoint into a staging folder, and rename it into its place once it is complete."""
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging, final = os.path.join(run_dir, STAGING), os.path.join(run_dir, name)
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with clean_failure(staging, run_dir, final):
            self.staging_folder, self._push_after_publishing = staging, None
            try:
                super().write_checkpoint(write, run_dir)
            finally:
                self.staging_folder = None
            self.state.best_model_checkpoint = self._best_checkpoint(run_dir, final)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(os.path.join(staging, name, "trainer_state.json"))
                write_manifest(os.path.join(staging, name), run_facts(self))
                publish(os.path.join(staging, name), final)
                shutil.rmtree(staging)
                rotate(run_dir, self.args.save_total_limit, [final, self.state.best_model_checkpoint])
        self.accelerator.wait_for_everyone()
        if self._push_after_publishing is not None:
            self.push_checkpoint(final, self._push_after_publishing)

    def _best_checkpoint(self, run_dir: str, final: str) -> str | None:
        """The best checkpoint under its final name, also where the run's folder has another name than it had then."""
        best = self.state.best_model_checkpoint
        if not self.state.best_global_step or self.args.save_strategy == SaveStrategy.NO:
            return best
        named = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        return named if named == final or os.path.isdir(named) else best

    def push_checkpoint(self, folder: str, push: Callable[[], None]) -> None:
        """Push a checkpoint; only after it has its final name."""
        if self.staging_folder:
            self._push_after_publishing = push
        else:
            super().push_checkpoint(folder, push)

    def wrote_optimizer(self, folder: str) -> None:
        """Save the echo networks with the optimizer state they belong to (skipped by `save_only_model`)."""
        if self.echo is None:
            return
        state = whole_state(self.echo.networks)
        if self.args.should_save:
            metadata = {"echo": json.dumps(self._echo_options()), "passes": json.dumps(self.pass_choice.state())}
            save_file(state, os.path.join(folder, ECHO_WEIGHTS), metadata=metadata)

    # Resuming

    def _resume_point(self, wanted: str | bool | None) -> str | None:
        """The checkpoint to continue from, the same on every process (see `resume.find_checkpoint`)."""
        found: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                bring_back(self.args.output_dir)
                found[0] = find_checkpoint(self.args.output_dir, wanted)
                if found[0] is not None:
                    facts = run_facts(self)
                    del facts["planned_steps"]  # known once training begins
                    if self.args.auto_find_batch_size:  # the trainer takes up the batch size it had found
                        del facts["global_batch"]
                    check_same_run(found[0], facts)
            except ValueError as error:
                found[1] = str(error)
        broadcast_object_list(found)
        if found[1] is not None:
            raise ValueError(found[1])
        return found[0]

    def before_optimizer_loads(self, checkpoint: str | None) -> None:
        """Load the echo networks before the optimizer state that belongs to them."""
        if checkpoint is not None and self.accelerator.is_main_process:
            check_same_run(checkpoint, {"planned_steps": self.state.max_steps})
        if checkpoint is not None and self.echo is not None:
            self.pass_choice.begin(self._load_echo_networks(checkpoint))
        elif checkpoint is not None and os.path.isfile(os.path.join(checkpoint, ECHO_WEIGHTS)):
            raise ValueError(
                f"The checkpoint {checkpoint} was saved with the echo on, and this run has it off. Continue with the "
                f"echo_* options of that run, or start a new run from its adapter."
            )

    def run_epoch(self, run: Callable[[], None]) -> None:
        """Train an epoch; none where the run that is continued had already done its last step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super().run_epoch(run)

    def load_best(self, load: Callable[[], None]) -> None:
        """Load the best adapter, and its echo networks where the checkpoint holds them; not a damaged one."""
        best = self.state.best_model_checkpoint
        why = [damage(best) if best and self.accelerator.is_main_process and os.path.isdir(best) else None]
        broadcast_object_list(why)
        if why[0] is not None:
            logger.error(
                "The best checkpoint %s is damaged (%s), so it is not loaded: the model is that of the last step.",
                best,
                why[0],
            )
            return
        super().load_best(load)
        self._weights_of_step = self.state.best_global_step
        if self.echo is not None and best and os.path.isfile(os.path.join(best, ECHO_WEIGHTS)):
            self._load_echo_networks(best)

    def _load_echo_networks(self, checkpoint: str) -> dict[str, str]:
        """Load the networks; the forms of the echo pass that had failed by then (`PassChoice.state`)."""
        path = os.path.join(checkpoint, ECHO_WEIGHTS)
        if not os.path.isfile(path):
            raise ValueError(
                f"The checkpoint {checkpoint} holds no {ECHO_WEIGHTS}, so the echo networks cannot go on from it. "
                f"It was saved with save_only_model=True or without the echo. Continue from another checkpoint, or "
                f"start a new run from its adapter: PeftModel.from_pretrained(model, {checkpoint!r}, "
                f"is_trainable=True)."
            )
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            saved = json.loads(metadata.get("echo", "{}"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
        options = self._echo_options()
        changed = [f"{k} was {saved.get(k)!r}, is {v!r}" for k, v in options.items() if saved.get(k) != v]
        if changed:
            raise ValueError(
                f"The checkpoint {checkpoint} belongs to other echo options: {'; '.join(changed)}. Continue with the "
                f"options it was saved with, or start a new run."
            )
        if not self.is_deepspeed_enabled:  # DeepSpeed's own checkpoint holds all that is trained and is loaded by now
            load_whole_state(self.echo.networks, state)
        return json.loads(metadata.get("passes", "{}"))

    def _echo_options(self) -> dict[str, Any]:
        """What must not change between stop and resume, since the echo networks were trained for it."""
        return {
            "source_layers": self.echo.source_layers,
            "targets": [site_key(site) for site in self.echo.sites],
            **{name: getattr(self.args, f"echo_{name}") for name in RESUME_OPTIONS},
            "seed": self.args.resolved_echo_seed,
        }
