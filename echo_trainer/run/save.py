"""Saving the adapter: into a staging folder, verified there, and moved into its place whole."""

import logging
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapter.check import Report
from ..adapter.read import read_adapter
from ..files import publish_files
from ..report.folder import saved_facts, write_run_folder
from ..report.record import run_record
from .checkpoint_files import STAGING, is_checkpoint
from .final_save import (
    adapter_folders,
    compare_written,
    finish_adapter,
    keep_trained,
    refuse_non_finite,
    save_new_rows,
    trained_tensors,
)
from .full_disk import clean_failure
from .gathering import keeps_shards, whole_trainable_state
from .host import SavingHost
from .reload import UnloadableAdapterError, compare_reloaded

logger = logging.getLogger(__name__)

TRAINING_ARGUMENTS = "training_args.bin"
UNLOADABLE = "unloadable"


class Saver:
    """
    Saving the final model for a trainer.

    Args:
        host: the trainer.
        make_record: the record of its run, from the trainer and the public id of its data.
    """

    def __init__(self, host: SavingHost, make_record: Callable[[Any, str | None], dict[str, Any]] = run_record):
        self.host, self.make_record = host, make_record
        self._saved: dict[str, Any] | None = None  # facts of the adapter that was last saved into `output_dir`

    def save_model(
        self,
        save: Callable[..., None],
        save_gathered: Callable[[str, dict], None],
        output_dir: str | None,
        _internal_call: bool,
    ) -> None:
        """
        Save as transformers does. With FSDP2 the adapter alone is gathered, for sharded state dicts as well.

        Args:
            save: the Trainer's `save_model`.
            save_gathered: see `compat.trainer.JointTrainer`.
            output_dir, _internal_call: its arguments.
        """
        host = self.host
        folder = output_dir if output_dir is not None else host.args.output_dir
        if not host.is_fsdp_enabled or host.echo is None or (keeps_shards(host) and is_checkpoint(folder)):
            save(output_dir, _internal_call)
            return
        save_gathered(folder, whole_trainable_state(host.model))
        if host.args.push_to_hub and not _internal_call:
            host.push_to_hub(commit_message="Model save", revision=host.args.hub_revision)

    def write(self, folder: str, write: Callable[[str], None], state_dict: dict | None) -> None:
        """
        Save an ordinary PEFT adapter; outside checkpoints also the card and the record of the run.

        Args:
            folder: where to.
            write: the Trainer's save, into the folder it is given.
            state_dict: tensors that an engine has gathered; None takes the model's.

        Every process must call it; an error of one is raised on all of them.

        Raises:
            NonFiniteAdapterError: the adapter holds NaN or infinity; nothing was written.
            OSError: what was written is not what was trained.
            UnloadableAdapterError: what was written cannot be loaded and run as what was trained; it is set aside.
        """
        host = self.host
        with host.agreement.together():
            adapters = trained_tensors(host.model, state_dict) if host.args.should_save else {}
            refuse_non_finite(adapters, host.args.output_dir)
        with host.agreement.together():
            if is_checkpoint(folder):
                write(folder)
                if host.args.should_save:
                    drop_pickle(folder)
            else:
                self._write_final(folder, write, adapters, state_dict)

    def _write_final(
        self, folder: str, write: Callable[[str], None], adapters: dict[str, dict[str, Tensor]], state_dict: Any
    ) -> None:
        host, staging = self.host, os.path.join(folder, STAGING)
        if host.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        with clean_failure(staging, host.args.output_dir, folder):
            write(staging)
            if not host.args.should_save:
                return
            drop_pickle(staging)
            report = None
            if adapters:
                keep_trained(staging, host.model)
                compare_written(staging, {name: adapters[name] for name in host.model.active_adapters})
                save_new_rows(staging, host.model, state_dict)
                report = finish_adapter(staging, host.model, portable=host.args.portable_adapter, shown_as=folder)
                self._compare_reloaded(staging, folder, report)
            saved = saved_facts(report)  # now: the files will have another place
            self._describe(staging, saved)
            publish_files(staging, folder)
        if folder == host.args.output_dir:
            self._saved = saved

    def _compare_reloaded(self, staging: str, folder: str, report: Report | None) -> None:
        """Load what was saved as a user does; what cannot be loaded is set aside, where nobody takes it for good."""
        model = self.host.model
        files = report.files if report is not None else None  # those of the first active adapter
        try:
            saved = {
                name: files if files is not None and path == files.folder else read_adapter(path)
                for name, path in adapter_folders(staging, model.active_adapters)
            }
            reason = compare_reloaded(saved, model)
        except UnloadableAdapterError as error:
            aside = Path(folder, UNLOADABLE, "files")
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(staging, aside)
            raise UnloadableAdapterError(
                f"{error} What was saved before in {folder} is as it was; the trained tensors are kept in {aside}."
            ) from error
        if reason is not None:
            logger.warning("The saved adapter was not loaded again and compared with the trained model: %s.", reason)

    def card(self, dataset_name: str | None) -> None:
        """
        Write our model card and run record to `output_dir`.

        TRL asks for it at every checkpoint, where an error ends every process. A script may ask for it on the main
        process alone.
        """
        host = self.host
        with host.agreement.together() if host.staging_folder else nullcontext():
            if host.is_world_process_zero():
                self._write_card(host.args.output_dir, dataset_name)

    def _write_card(self, folder: str, dataset_name: str | None) -> None:
        staging = os.path.join(folder, f"{STAGING}-card")
        with clean_failure(staging, folder, folder):
            os.makedirs(staging, exist_ok=True)
            self._describe(staging, self._saved, dataset_name)
            publish_files(staging, folder)

    def _describe(self, folder: str, saved: dict[str, Any] | None, dataset_name: str | None = None) -> None:
        """Write card, record and curves. Whatever fails there, disks aside, must not cost the adapter."""
        try:
            write_run_folder(self.host, folder, saved, dataset_name, self.make_record)
        except OSError:
            raise
        except Exception:
            logger.exception("The card of the adapter could not be written; the adapter itself is saved. Report this.")


def drop_pickle(folder: str) -> None:
    """Remove the pickle of the arguments: nothing needs it, and it would be uploaded with the adapter."""
    Path(folder, TRAINING_ARGUMENTS).unlink(missing_ok=True)
