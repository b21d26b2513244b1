"""Checkpoints of a run, with the echo networks beside the adapter, and the way back from them."""

import logging
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from ..files import ADAPTER_WEIGHTS
from ..manifest import read_manifest, write_manifest
from ..method.sites import site_key
from ..passes.setup import EchoSetup
from .checkpoint_files import STAGING, STATE, bring_back, damage, publish, rotate
from .echo_weights import EchoWeights, has_echo_weights, read_echo_weights, write_echo_weights
from .full_disk import clean_failure, removed_on_failure
from .gathering import load_whole_state, whole_state
from .host import Host
from .resume import check_same_run, find_checkpoint, run_facts

logger = logging.getLogger(__name__)

RESUME_OPTIONS = (
    "bottleneck", "aggregation", "positions", "p_start", "p_end", "kd_weight", "kd_temperature", "teacher", "gate",
    "detach", "loss",
)  # fmt: skip


class Checkpoints:
    """
    Saving and loading for a trainer.

    Attributes:
        weights_of_step: an earlier step than the last, where the best model was loaded; else None.
        begun: whether this trainer has trained, so that a run in its folder may be its own.
    """

    def __init__(self, host: Host):
        self.host = host
        self.weights_of_step: int | None = None
        self.begun = False

    # Checkpoints

    def write(self, write: Callable[[], None], run_dir: str) -> None:
        """
        Save a checkpoint into a staging folder, and rename it into its place once it is complete.

        Args:
            write: the Trainer's save; writes into the trainer's `staging_folder`.
            run_dir: folder of the run.

        Raises:
            OSError: it could not be written; on every process, whichever it was that could not.
        """
        host = self.host
        name = f"{PREFIX_CHECKPOINT_DIR}-{host.state.global_step}"
        staging, final = os.path.join(run_dir, STAGING), os.path.join(run_dir, name)
        publishes = self._clear(staging)
        # Removed only when nobody writes there any more: else an error of one process makes others of another kind.
        with removed_on_failure(staging), host.agreement.together(), clean_failure(None, run_dir, final):
            host.staging_folder, host.push_is_due = staging, False
            try:
                write()
            finally:
                host.staging_folder = None
        host.state.best_model_checkpoint = host.agreement.decide(lambda: self._best_checkpoint(run_dir, final))
        with host.agreement.together(), clean_failure(staging, run_dir, final):
            if publishes and os.path.isdir(os.path.join(staging, name)):
                host.state.save_to_json(os.path.join(staging, name, STATE))
                facts = {**run_facts(host), "published_by": host.args.process_index, "spent": host.spent.by_now()}
                write_manifest(os.path.join(staging, name), facts)
                publish(os.path.join(staging, name), final)
                rotate(run_dir, host.args.save_total_limit, [final, host.state.best_model_checkpoint])
            if publishes:
                shutil.rmtree(staging)
        if host.push_is_due:
            host.pushes.checkpoint(final)

    def _clear(self, staging: str) -> bool:
        """
        Make an empty staging folder.

        Returns:
            Whether this process publishes what is written there. The main one does; and so does one process of every
            node that has a disk of its own, where the shards of its processes are.
        """
        args, agreement = self.host.args, self.host.agreement
        sign = os.path.join(staging, agreement.decide(lambda: f".{uuid.uuid4().hex}"))
        with agreement.together(), clean_failure(staging, os.path.dirname(staging), staging):
            if args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
                os.makedirs(staging, exist_ok=True)
                Path(sign).touch()
        own_disk = args.local_process_index == 0 and not os.path.exists(sign)
        with agreement.together():
            if own_disk:
                shutil.rmtree(staging, ignore_errors=True)
        return args.should_save or own_disk

    def _best_checkpoint(self, run_dir: str, final: str) -> str | None:
        """The best checkpoint under its final name, also where the run's folder has another name than it had then."""
        best = self.host.state.best_model_checkpoint
        if not self.host.state.best_global_step or self.host.args.save_strategy == SaveStrategy.NO:
            return best
        named = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.host.state.best_global_step}")
        return named if named == final or os.path.isdir(named) else best

    def save_optimizer(self, save: Callable[[], None], folder: str) -> None:
        """Save the optimizer, and the echo networks that its state belongs to (skipped by `save_only_model`)."""
        agreement, echo, passes = self.host.agreement, self.host.echo, self.host.pass_choice
        with agreement.together():
            save()
        if echo is None or passes is None:
            return
        state, seen = whole_state(echo.networks), self.host.echo_metrics.seen_by_now()
        with agreement.together():
            if self.host.args.should_save:
                probation = self.host.probation.state()
                options = {**self._echo_options(echo), "layers": self.host.args.echo_layers}
                write_echo_weights(folder, EchoWeights(state, options, passes.state(), probation, seen))

    # Resuming

    def resume_point(self, wanted: str | bool | None) -> str | None:
        """The checkpoint to continue from, the same on every process (see `resume.find_checkpoint`)."""
        host = self.host

        def find() -> str | None:
            bring_back(host.args.output_dir)
            found = find_checkpoint(host.args.output_dir, wanted)
            if found is not None:
                facts = run_facts(host)
                del facts["planned_steps"]  # known once training begins
                if host.args.auto_find_batch_size:  # the trainer takes up the batch size it had found
                    del facts["global_batch"]
                check_same_run(found, facts)
            return found

        found = host.agreement.decide(find)
        with host.agreement.together():
            if found is not None and not host.is_world_process_zero():
                self._check_own_part(found)
            host.spent.begin(found)
        if found is None and not self.begun and os.path.isfile(os.path.join(host.args.output_dir, ADAPTER_WEIGHTS)):
            logger.warning(
                "output_dir is %s, which holds a finished run: saving into it replaces its adapter, card and record.",
                host.args.output_dir,
            )
        self.begun = True
        return found

    def _check_own_part(self, checkpoint: str) -> None:
        """Look at a checkpoint that the main process has found: here it may be the part on the disk of this node."""
        if self.host.args.local_process_index == 0:
            bring_back(self.host.args.output_dir)
        part = read_manifest(checkpoint)
        own = part is not None and part.get("published_by") == self.host.args.process_index
        why = damage(checkpoint) if own or not os.path.isfile(os.path.join(checkpoint, STATE)) else None
        if why is not None:
            raise ValueError(
                f"The checkpoint {checkpoint} is whole on the main process, and on the node of process "
                f"{self.host.args.process_index} it is not: {why}. Copy the node's part back to where it was, or "
                f"continue from another checkpoint."
            )

    def load(self, load: Callable[[], None]) -> None:
        """Load a part of a checkpoint, on every process or on none."""
        with self.host.agreement.together():
            load()

    def load_optimizer(self, load: Callable[[], None], checkpoint: str | None) -> None:
        """Load the echo networks, then the optimizer state that belongs to them."""
        if checkpoint is not None:
            with self.host.agreement.together():
                self._check_before_loading(checkpoint)
            echo, passes = self.host.echo, self.host.pass_choice
            if echo is not None and passes is not None:
                weights = self._load_echo_networks(echo, checkpoint)
                passes.begin(weights.passes)
                self.host.probation.begin(weights.probation)
                self.host.echo_metrics.begin(weights.seen)
                self.host.tokens_trained_on = self.host.echo_metrics.seen["input_tokens"]
        self.load(load)

    def _check_before_loading(self, checkpoint: str) -> None:
        if self.host.is_world_process_zero():
            check_same_run(checkpoint, {"planned_steps": self.host.state.max_steps})
        if self.host.echo is None and has_echo_weights(checkpoint):
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

        def look() -> tuple[str | None, bool]:
            if not best or not os.path.isdir(best):
                return None, False
            return damage(best), has_echo_weights(best)

        why, with_echo = self.host.agreement.decide(look)
        if why is not None:
            logger.error(
                "The best checkpoint %s is damaged (%s), so it is not loaded: the model is that of the last step.",
                best,
                why,
            )
            return
        self.load(load)
        self.weights_of_step = self.host.state.best_global_step
        if self.host.echo is not None and with_echo:
            self._load_echo_networks(self.host.echo, best)

    def _load_echo_networks(self, echo: EchoSetup, checkpoint: str) -> EchoWeights:
        """Load the networks; with what else was saved beside them."""
        with self.host.agreement.together():
            weights = read_echo_weights(checkpoint)
            self._check_same_echo(echo, checkpoint, weights.options)
        if not self.host.is_deepspeed_enabled:  # DeepSpeed's own holds all that is trained, and is loaded by now
            load_whole_state(echo.networks, weights.tensors)
        return weights

    def _check_same_echo(self, echo: EchoSetup, checkpoint: str, saved: dict[str, Any]) -> None:
        options = self._echo_options(echo)
        changed = [f"{k} was {saved.get(k)!r}, is {v!r}" for k, v in options.items() if saved.get(k) != v]
        if changed:
            raise ValueError(
                f"The checkpoint {checkpoint} belongs to other echo options: {'; '.join(changed)}. Continue with the "
                f"options it was saved with, or start a new run."
            )

    def _echo_options(self, echo: EchoSetup) -> dict[str, Any]:
        """What must not change between stop and resume, since the echo networks were trained for it."""
        return {
            "source_layers": echo.source_layers,
            "targets": [site_key(site) for site in echo.sites],
            **{name: getattr(self.host.args, f"echo_{name}") for name in RESUME_OPTIONS},
            "seed": self.host.args.resolved_echo_seed,
        }
