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
from ..passes.setup import EchoSetup
from .checkpoint_files import STAGING, bring_back, damage, publish, rotate
from .full_disk import clean_failure
from .gathering import load_whole_state, whole_state
from .host import Host
from .resume import check_same_run, find_checkpoint, run_facts

logger = logging.getLogger(__name__)

ECHO_WEIGHTS = "echo_networks.safetensors"
RESUME_OPTIONS = (
    "bottleneck", "aggregation", "positions", "p_start", "p_end", "kd_weight", "kd_temperature", "teacher",
)  # fmt: skip


class Checkpoints:
    """
    Saving and loading for a trainer.

    Attributes:
        weights_of_step: an earlier step than the last, where the best model was loaded; else None.
    """

    def __init__(self, host: Host):
        self.host = host
        self.weights_of_step: int | None = None

    # Checkpoints

    def write(self, write: Callable[[], None], run_dir: str) -> None:
        """
        Save a checkpoint into a staging folder, and rename it into its place once it is complete.

        Args:
            write: the Trainer's save; writes into the trainer's `staging_folder`.
            run_dir: folder of the run.
        """
        host = self.host
        name = f"{PREFIX_CHECKPOINT_DIR}-{host.state.global_step}"
        staging, final = os.path.join(run_dir, STAGING), os.path.join(run_dir, name)
        if host.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        host.accelerator.wait_for_everyone()
        with clean_failure(staging, run_dir, final):
            host.staging_folder, host.push_is_due = staging, False
            try:
                write()
            finally:
                host.staging_folder = None
            host.state.best_model_checkpoint = self._best_checkpoint(run_dir, final)
            host.accelerator.wait_for_everyone()
            if host.args.should_save:
                host.state.save_to_json(os.path.join(staging, name, "trainer_state.json"))
                write_manifest(os.path.join(staging, name), run_facts(host))
                publish(os.path.join(staging, name), final)
                shutil.rmtree(staging)
                rotate(run_dir, host.args.save_total_limit, [final, host.state.best_model_checkpoint])
        host.accelerator.wait_for_everyone()
        if host.push_is_due:
            host.pushes.checkpoint(final)

    def _best_checkpoint(self, run_dir: str, final: str) -> str | None:
        """The best checkpoint under its final name, also where the run's folder has another name than it had then."""
        best = self.host.state.best_model_checkpoint
        if not self.host.state.best_global_step or self.host.args.save_strategy == SaveStrategy.NO:
            return best
        named = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.host.state.best_global_step}")
        return named if named == final or os.path.isdir(named) else best

    def wrote_optimizer(self, folder: str) -> None:
        """Save the echo networks with the optimizer state they belong to (skipped by `save_only_model`)."""
        echo, passes = self.host.echo, self.host.pass_choice
        if echo is None or passes is None:
            return
        state = whole_state(echo.networks)
        if self.host.args.should_save:
            metadata = {"echo": json.dumps(self._echo_options(echo)), "passes": json.dumps(passes.state())}
            save_file(state, os.path.join(folder, ECHO_WEIGHTS), metadata=metadata)

    # Resuming

    def resume_point(self, wanted: str | bool | None) -> str | None:
        """The checkpoint to continue from, the same on every process (see `resume.find_checkpoint`)."""
        found: list[Any] = [None, None]
        if self.host.accelerator.is_main_process:
            try:
                bring_back(self.host.args.output_dir)
                found[0] = find_checkpoint(self.host.args.output_dir, wanted)
                if found[0] is not None:
                    facts = run_facts(self.host)
                    del facts["planned_steps"]  # known once training begins
                    if self.host.args.auto_find_batch_size:  # the trainer takes up the batch size it had found
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
        if checkpoint is not None and self.host.accelerator.is_main_process:
            check_same_run(checkpoint, {"planned_steps": self.host.state.max_steps})
        echo, passes = self.host.echo, self.host.pass_choice
        if checkpoint is not None and echo is not None and passes is not None:
            passes.begin(self._load_echo_networks(echo, checkpoint))
        elif checkpoint is not None and os.path.isfile(os.path.join(checkpoint, ECHO_WEIGHTS)):
            raise ValueError(
                f"The checkpoint {checkpoint} was saved with the echo on, and this run has it off. Continue with the "
                f"echo_* options of that run, or start a new run from its adapter."
            )

    def run_epoch(self, run: Callable[[], None]) -> None:
        """Train an epoch; none where the run that is continued had already done its last step."""
        if self.host.state.global_step >= self.host.state.max_steps:
            self.host.control.should_training_stop = True
            return
        run()

    def load_best(self, load: Callable[[], None]) -> None:
        """Load the best adapter, and its echo networks where the checkpoint holds them; not a damaged one."""
        best = self.host.state.best_model_checkpoint
        why = [damage(best) if best and self.host.accelerator.is_main_process and os.path.isdir(best) else None]
        broadcast_object_list(why)
        if why[0] is not None:
            logger.error(
                "The best checkpoint %s is damaged (%s), so it is not loaded: the model is that of the last step.",
                best,
                why[0],
            )
            return
        load()
        self.weights_of_step = self.host.state.best_global_step
        if self.host.echo is not None and best and os.path.isfile(os.path.join(best, ECHO_WEIGHTS)):
            self._load_echo_networks(self.host.echo, best)

    def _load_echo_networks(self, echo: EchoSetup, checkpoint: str) -> dict[str, str]:
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
        options = self._echo_options(echo)
        changed = [f"{k} was {saved.get(k)!r}, is {v!r}" for k, v in options.items() if saved.get(k) != v]
        if changed:
            raise ValueError(
                f"The checkpoint {checkpoint} belongs to other echo options: {'; '.join(changed)}. Continue with the "
                f"options it was saved with, or start a new run."
            )
        if not self.host.is_deepspeed_enabled:  # DeepSpeed's own holds all that is trained, and is loaded by now
            load_whole_state(echo.networks, state)
        return json.loads(metadata.get("passes", "{}"))

    def _echo_options(self, echo: EchoSetup) -> dict[str, Any]:
        """What must not change between stop and resume, since the echo networks were trained for it."""
        return {
            "source_layers": echo.source_layers,
            "targets": [site_key(site) for site in echo.sites],
            **{name: getattr(self.host.args, f"echo_{name}") for name in RESUME_OPTIONS},
            "seed": self.host.args.resolved_echo_seed,
        }
