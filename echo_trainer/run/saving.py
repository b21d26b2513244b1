"""Saving the adapter: into a staging folder, verified there, and moved into its place whole."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files import publish_files
from ..report.folder import write_run_folder
from .checkpoint_files import STAGING, is_checkpoint
from .final_save import compare_written, finish_adapter, refuse_non_finite, trained_tensors
from .full_disk import clean_failure
from .gathering import keeps_shards, whole_trainable_state

logger = logging.getLogger(__name__)

TRAINING_ARGUMENTS = "training_args.bin"


class EchoSavingMixin:
    """Saving for `EchoSFTTrainer`; relies on `self.echo` (an `EchoSetup`, or None with the echo off)."""

    echo: Any = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as transformers does. With FSDP2 the adapter alone is gathered, for sharded state dicts as well."""
        folder = output_dir if output_dir is not None else self.args.output_dir
        if not self.is_fsdp_enabled or self.echo is None or (keeps_shards(self) and is_checkpoint(folder)):
            super().save_model(output_dir, _internal_call)
            return
        self.save_state(folder, whole_trainable_state(self.model))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def write_model(self, output_dir: str, write: Callable[[str], None], state_dict: dict | None) -> None:
        """
        Save an ordinary PEFT adapter; outside checkpoints also the card and the record of the run.

        Raises:
            NonFiniteAdapterError: the adapter holds NaN or infinity; nothing was written.
            OSError: what was written is not what was trained.
        """
        adapters = trained_tensors(self.model, state_dict) if self.args.should_save else {}
        refuse_non_finite(adapters, self.args.output_dir)
        if is_checkpoint(output_dir):
            super().write_model(output_dir, write, state_dict)
            if self.args.should_save:
                drop_pickle(output_dir)
            return
        staging = os.path.join(output_dir, STAGING)
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        with clean_failure(staging, self.args.output_dir, output_dir):
            super().write_model(staging, write, state_dict)
            if not self.args.should_save:
                return
            drop_pickle(staging)
            compare_written(staging, adapters)
            finish_adapter(staging, self.model, portable=self.args.portable_adapter, shown_as=output_dir)
            self._describe(staging)
            publish_files(staging, output_dir)

    def _describe(self, folder: str, **options: Any) -> None:
        """Write card, record and curves. Whatever fails there, disks aside, must not cost the adapter."""
        try:
            write_run_folder(self, folder, **options)
        except OSError:
            raise
        except Exception:
            logger.exception("The card of the adapter could not be written; the adapter itself is saved. Report this.")

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None
    ) -> None:
        """Write our model card and run record to `output_dir` (TRL calls this at every checkpoint and push)."""
        if self.is_world_process_zero():
            staging = os.path.join(self.args.output_dir, f"{STAGING}-card")
            with clean_failure(staging, self.args.output_dir, self.args.output_dir):
                os.makedirs(staging, exist_ok=True)
                self._describe(staging, dataset_name=dataset_name)
                publish_files(staging, self.args.output_dir)


def drop_pickle(folder: str) -> None:
    """Remove the pickle of the arguments: nothing needs it, and it would be uploaded with the adapter."""
    Path(folder, TRAINING_ARGUMENTS).unlink(missing_ok=True)
