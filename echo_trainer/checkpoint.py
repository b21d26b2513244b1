"""What is written where: checkpoints hold the echo networks beside the adapter, the final folder never does."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from .checkpoint_files import STAGING, is_checkpoint, last_whole_checkpoint, publish, publish_files, write_manifest
from .final_save import compare_written, finish_adapter, refuse_non_finite, trained_tensors
from .gathering import keeps_shards, load_whole_state, whole_state, whole_trainable_state
from .network import site_key
from .resume import check_same_run, find_checkpoint, run_facts
from .run_folder import write_run_folder

ECHO_WEIGHTS = "echo_networks.safetensors"
TRAINING_ARGUMENTS = "training_args.bin"
RESUME_OPTIONS = (
    "bottleneck", "aggregation", "positions", "p_start", "p_end", "kd_weight", "kd_temperature", "teacher",
)  # fmt: skip
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class EchoCheckpointMixin:
    """Saving and loading for `EchoSFTTrainer`; relies on `self.echo` (an `EchoSetup`, or None with the echo off)."""

    echo: Any = None
    _staging: str | None = None
    _push_after_publishing = False

    # Checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint into a staging folder, and rename it into its place once it is complete."""
        run_dir = super()._get_output_dir(trial=trial)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging, final = os.path.join(run_dir, STAGING), os.path.join(run_dir, name)
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with _clean_failure(staging, run_dir, final):
            self._staging, self._push_after_publishing = staging, False
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            if (self.state.best_model_checkpoint or "").startswith(staging):
                self.state.best_model_checkpoint = final
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(os.path.join(staging, name, "trainer_state.json"))
                write_manifest(os.path.join(staging, name), run_facts(self))
                publish(os.path.join(staging, name), final)
                shutil.rmtree(staging)
                rotate_checkpoints(
                    output_dir=run_dir,
                    save_total_limit=self.args.save_total_limit,
                    best_model_checkpoint=self.state.best_model_checkpoint,
                    use_mtime=True,
                )
        self.accelerator.wait_for_everyone()
        if self._push_after_publishing:
            self._push_from_checkpoint(final)

    def _get_output_dir(self, trial: Any) -> str:
        """The folder of the run; while a checkpoint is being saved, its staging folder."""
        return self._staging or super()._get_output_dir(trial=trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint; only after it has its final name."""
        if self._staging:
            self._push_after_publishing = True
        else:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save the echo networks with the optimizer state they belong to (skipped by `save_only_model`)."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.echo is None:
            return
        state = whole_state(self.echo.networks)
        if self.args.should_save:
            metadata = {"echo": json.dumps(self._echo_options())}
            save_file(state, os.path.join(output_dir, ECHO_WEIGHTS), metadata=metadata)

    # Resuming

    def _resume_point(self, wanted: str | bool | None) -> str | None:
        """The checkpoint to continue from, the same on every process (see `resume.find_checkpoint`)."""
        found: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                found[0] = find_checkpoint(self.args.output_dir, wanted)
                if found[0] is not None:
                    facts = run_facts(self)
                    del facts["planned_steps"]  # known once training begins
                    check_same_run(found[0], facts)
            except ValueError as error:
                found[1] = str(error)
        broadcast_object_list(found)
        if found[1] is not None:
            raise ValueError(found[1])
        return found[0]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the echo networks before the optimizer state that belongs to them."""
        if checkpoint is not None and self.accelerator.is_main_process:
            check_same_run(checkpoint, {"planned_steps": self.state.max_steps})
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
        if not self.is_deepspeed_enabled:  # DeepSpeed's own checkpoint holds all that is trained and is loaded by now
            load_whole_state(self.echo.networks, state)

    def _echo_options(self) -> dict[str, Any]:
        """What must not change between stop and resume, since the echo networks were trained for it."""
        return {
            "source_layers": self.echo.source_layers,
            "targets": [site_key(site) for site in self.echo.sites],
            **{name: getattr(self.args, f"echo_{name}") for name in RESUME_OPTIONS},
            "seed": self.args.resolved_echo_seed,
        }

    # The final adapter

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as transformers does. With FSDP2 the adapter alone is gathered, for sharded state dicts as well."""
        folder = output_dir if output_dir is not None else self.args.output_dir
        if not self.is_fsdp_enabled or self.echo is None or (keeps_shards(self) and is_checkpoint(folder)):
            super().save_model(output_dir, _internal_call)
            return
        self._save(folder, state_dict=whole_trainable_state(self.model))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """
        Save an ordinary PEFT adapter; outside checkpoints also the card and the record of the run.

        Raises:
            NonFiniteAdapterError: the adapter holds NaN or infinity; nothing was written.
            OSError: what was written is not what was trained.
        """
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        adapters = trained_tensors(self.model, state_dict) if self.args.should_save else {}
        refuse_non_finite(adapters, last_whole_checkpoint(self.args.output_dir)[0])
        if is_checkpoint(output_dir):
            super()._save(output_dir, state_dict=state_dict)
            if self.args.should_save:
                _drop_pickle(output_dir)
            return
        staging = os.path.join(output_dir, STAGING)
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        with _clean_failure(staging, self.args.output_dir, output_dir):
            super()._save(staging, state_dict=state_dict)
            if not self.args.should_save:
                return
            _drop_pickle(staging)
            compare_written(staging, adapters)
            finish_adapter(staging, self.model, portable=self.args.portable_adapter, shown_as=output_dir)
            write_run_folder(self, staging)
            publish_files(staging, output_dir)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None
    ) -> None:
        """Write our model card and run record to `output_dir` (TRL calls this at every checkpoint and push)."""
        if self.is_world_process_zero():
            staging = os.path.join(self.args.output_dir, f"{STAGING}-card")
            with _clean_failure(staging, self.args.output_dir, self.args.output_dir):
                write_run_folder(self, staging, dataset_name=dataset_name)
                publish_files(staging, self.args.output_dir)


@contextmanager
def _clean_failure(staging: str, run_dir: str, final: str) -> Iterator[None]:
    """Remove what a failed save has left, and say what is lost (nothing) where the disk is full."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        full = _disk_is_full(error, run_dir)
        shutil.rmtree(staging, ignore_errors=True)
        if not full:
            raise
        whole, _ = last_whole_checkpoint(run_dir)
        back = f"The last whole checkpoint is {whole}" if whole else f"There is no checkpoint in {run_dir} yet"
        raise OSError(
            errno.ENOSPC,
            f"The disk is full: {final} could not be written ({error}). {back}. Free some space (save_total_limit=2 "
            f"keeps two checkpoints only) and start again with resume_from_checkpoint=True",
        ) from error


def _disk_is_full(error: BaseException, folder: str) -> bool:
    """Whether a failed write ran out of space; torch and safetensors do not say so by an error number."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _NO_SPACE
    text = str(error)
    if any(sign in text for sign in ("No space left", "File too large", "quota exceeded")):
        return True
    return "file write failed" in text or ("unexpected pos" in text and shutil.disk_usage(folder).free < 2**24)


def _drop_pickle(folder: str) -> None:
    """Remove the pickle of the arguments: nothing needs it, and it would be uploaded with the adapter."""
    Path(folder, TRAINING_ARGUMENTS).unlink(missing_ok=True)
