"""A trainer's pushes: saved locally first, only listed files, and no failure is silent.

- before training: a Hub that cannot be reached is a warning, not the end of the run;
- at checkpoints: in the background, the same list of files and the same care;
- after training: the newest adapter is on the Hub, also with `hub_strategy="end"` or when a background push failed.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers.trainer_utils import HubStrategy

from ..adapter.folder import Adapter, AdapterError
from ..adapter.portable import NotPortableError, make_portable
from ..adapter.read import read_adapter
from ..hub.client import Patience, PushError, in_words
from ..hub.files import ADAPTER, RESUME, TOKENIZER, copy_listed, copy_run
from ..hub.push import Again, Pushed, RefusedError, last_words, preflight, push_adapter, push_copy
from .host import Host

logger = logging.getLogger(__name__)


class Pushes:
    """
    The pushes of a trainer.

    Attributes:
        patience: how long to go on trying.
    """

    patience: Patience = Patience()

    def __init__(self, host: Host):
        self.host = host
        self._worker: ThreadPoolExecutor | None = None
        self._jobs: tuple[tuple[str, Future], ...] = ()
        self._due: str | None = None  # the newest checkpoint that should be on the Hub
        self._done: str | None = None  # the newest one that is

    def preflight(self, token: str | None = None, private: bool | None = None) -> None:
        """Look whether pushing will work, and make the repository; what is wrong is a warning here."""
        host = self.host
        if not host.is_world_process_zero():
            return
        host.hub_model_id = self._name()
        private = private if private is not None else host.args.hub_private_repo
        token = token or host.args.hub_token
        try:
            target = preflight(host.hub_model_id, private, token, self.patience, host.args.hub_revision)
            host.hub_model_id = target.repo_id
        except Exception as error:
            reason = str(error) if isinstance(error, RefusedError) else in_words(error, (token,) if token else ())
            logger.warning(
                "Pushing to %s will not work as things are: %s. Training goes on, and the adapter is saved in %s; "
                "the push is tried again at the end.",
                host.hub_model_id,
                reason,
                host.args.output_dir,
            )

    def push(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        base_model: str | None = None,
        dataset_name: str | None = None,
    ) -> Pushed | Future | None:
        """
        Save the adapter in `output_dir`, then push it and compare its checksums; see `EchoSFTTrainer.push_to_hub`.

        Raises:
            PushError: not pushed; the files are in `output_dir`, and the message holds the command to push again.
        """
        host = self.host
        host.callback_handler.on_push_begin(host.args, host.state, host.control)
        host.dataset_name = dataset_name or host.dataset_name  # for the card
        host.save_model(_internal_call=True)
        if not host.is_world_process_zero():
            return None
        self.finish()

        def push() -> Pushed:
            return push_adapter(
                host.args.output_dir,
                host.hub_model_id or self._name(),
                private=private if private is not None else host.args.hub_private_repo,
                token=token or host.args.hub_token,
                revision=revision or host.args.hub_revision,
                base_model=base_model,
                whole_model=not hasattr(host.model, "peft_config"),
                commit_message=commit_message or "End of training",
                patience=self.patience,
            )

        if not blocking:
            return self._in_background("the final push", push, self._due)
        pushed = push()
        self._after(pushed, self._due)
        return pushed

    def after_training(self) -> None:
        """See to it that the newest adapter is on the Hub, if `push_to_hub` is set."""
        args = self.host.args
        if not args.push_to_hub:
            return
        try:
            if args.hub_strategy == HubStrategy.END:
                self.host.push_to_hub()
            elif self._due is not None and self._due != self._done:
                logger.warning("Pushing %s, which is not on the Hub yet.", self._due)
                self._after(self._checkpoint_push(self._due)(), self._due)
        except PushError as error:
            logger.error("%s", error)  # the result of a finished training is worth more than its push

    def checkpoint(self, folder: str) -> None:
        """Push a checkpoint in the background; left out while another is on its way, unless `hub_always_push`."""
        host = self.host
        if not host.is_world_process_zero() or host.args.hub_strategy == HubStrategy.END:
            return
        self._due = folder
        if not host.args.hub_always_push and any(not job.done() for _, job in self._jobs):
            return  # `after_training` makes up for it in the end, if no later one does
        host.callback_handler.on_push_begin(host.args, host.state, host.control)
        try:
            push = self._checkpoint_push(folder)
        except PushError as error:
            logger.error("%s", error)
        else:
            self._in_background(f"the push of {Path(folder).name}", push, folder)

    def finish(self) -> None:
        """Wait for the background pushes, and say again which of them failed."""
        jobs, self._jobs = self._jobs, ()
        if any(not job.done() for _, job in jobs):
            logger.warning("Waiting for %s.", jobs[-1][0])
        failed = [name for name, job in jobs if job.exception() is not None]
        if failed:
            logger.error(
                "%d of %d background pushes failed: %s. Their errors are above; the files are in %s.",
                len(failed),
                len(jobs),
                ", ".join(failed),
                self.host.args.output_dir,
            )

    def _name(self) -> str:
        return self.host.args.hub_model_id or Path(self.host.args.output_dir).absolute().name

    def _checkpoint_push(self, checkpoint_folder: str) -> Any:
        """
        A function that pushes a checkpoint as it is now: the files are copied before this returns.

        Raises:
            PushError: the files cannot be copied.
        """
        args, source, model = self.host.args, Path(checkpoint_folder), self.host.model
        repo_id = self.host.hub_model_id or self._name()
        again = Again(checkpoint_folder, repo_id, args.hub_private_repo, args.hub_revision)
        whole_model = not hasattr(model, "peft_config")
        with ExitStack() as on_failure, last_words(again, args.hub_token):
            stage = Path(tempfile.mkdtemp(prefix="echo-push-"))
            on_failure.callback(shutil.rmtree, stage, ignore_errors=True)
            adapter = copy_run(source, stage, whole_model)
            copy_listed(Path(args.output_dir), stage, ("README.md", "echo_run.json", "assets/*.png"))
            if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                last = args.hub_strategy == HubStrategy.CHECKPOINT
                inner = stage / ("last-checkpoint" if last else source.name)
                copy_listed(source, inner, (*ADAPTER, *TOKENIZER, *RESUME))
            on_failure.pop_all()  # the push removes it
        message = f"Training in progress, step {self.host.state.global_step}"

        def push() -> Pushed:
            try:
                with last_words(again, args.hub_token):
                    sent = adapter
                    if sent is not None and args.portable_adapter:
                        sent = _portable(sent, model.get_base_model().config)
                    options = (args.hub_private_repo, args.hub_token, args.hub_revision, None, message)
                    return push_copy(stage, sent, repo_id, *options, self.patience)
            finally:
                shutil.rmtree(stage, ignore_errors=True)

        return push

    def _in_background(self, name: str, push: Any, checkpoint: str | None = None) -> Future:
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="echo-push")

        def run() -> Pushed:
            try:
                pushed = push()
            except BaseException as error:
                logger.error("In the background, %s failed. %s", name, error)
                raise
            self._after(pushed, checkpoint)
            return pushed

        job = self._worker.submit(run)
        self._jobs = (*self._jobs, (name, job))
        return job

    def _after(self, pushed: Pushed, checkpoint: str | None) -> None:
        self._done = checkpoint
        self.host.hub_model_id = pushed.repo_id
        for note in pushed.notes:
            logger.warning("%s", note)


def _portable(adapter: Adapter, base: Any) -> Adapter:
    try:
        return read_adapter(make_portable(adapter, base))
    except NotPortableError:
        return adapter  # DoRA and the like keep their form; the final save says so
    except AdapterError as error:
        raise RefusedError(str(error)) from error
