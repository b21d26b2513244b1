"""A trainer's pushes: saved locally first, only listed files, and no failure is silent.

- before training: a Hub that cannot be reached is a warning, not the end of the run;
- at checkpoints: in the background, the same list of files and the same care; what is sent is made ready in the thread
  that trains, and the other one only talks to the Hub;
- after training: the newest adapter is on the Hub, also with `hub_strategy="end"` or when a background push failed.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers.trainer_utils import HubStrategy

from ..adapter.base import Base, read_base
from ..adapter.folder import Adapter
from ..adapter.portable import NotPortableError, make_portable
from ..adapter.read import read_adapter
from ..compat.hub_client import use_timeout
from ..hub.client import Patience, PushError, in_words
from ..hub.files import ADAPTER, RESUME, TOKENIZER, copy_listed, copy_run
from ..hub.last_words import Again, RefusedError, last_words
from ..hub.push import Pushed, pack, preflight, send
from .host import SavingHost

logger = logging.getLogger(__name__)


class Pushes:
    """
    The pushes of a trainer.

    Attributes:
        patience: how long to go on trying.
        final: whether the adapter of the finished training is on the Hub.
    """

    patience: Patience = Patience()

    def __init__(self, host: SavingHost):
        self.host = host
        self.final = False
        self._base: Base | None = None  # shapes of the base
        self._worker: ThreadPoolExecutor | None = None
        self._jobs: tuple[tuple[str, Future], ...] = ()
        self._due: str | None = None  # the newest checkpoint that should be on the Hub
        self._done: str | None = None  # the newest one that is

    def preflight(self, token: str | None = None, private: bool | None = None) -> None:
        """Look whether pushing will work, and make the repository; what is wrong is a warning here."""
        host = self.host
        if not host.is_world_process_zero():
            return
        use_timeout(self.patience.timeout)
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

        Every process must call it; the main one pushes, and the others wait for it.

        Raises:
            PushError: not pushed; the files are in `output_dir`, and the message holds the command to push again.
        """
        host = self.host
        host.callback_handler.on_push_begin(host.args, host.state, host.control)
        host.dataset_name = dataset_name or host.dataset_name  # for the card
        host.save_model(_internal_call=True)
        result = None
        with host.agreement.together():
            if host.is_world_process_zero():
                self.finish()
                use_timeout(self.patience.timeout)
                private = private if private is not None else host.args.hub_private_repo
                revision, name = revision or host.args.hub_revision, host.hub_model_id or self._name()
                push = self._prepared(
                    Again(host.args.output_dir, name, private, revision, base_model, self._whole_model),
                    token or host.args.hub_token,
                    commit_message or "End of training",
                    lambda stage: copy_run(Path(host.args.output_dir), stage, self._whole_model),
                )
                if blocking:
                    result = push()
                    self._after(result, self._due)
                else:
                    result = self._in_background("the final push", push, self._due)
        return result

    def after_training(self) -> None:
        """See to it that the newest adapter is on the Hub, if `push_to_hub` is set."""
        args, self.final = self.host.args, False
        if not args.push_to_hub:
            return
        try:
            if args.hub_strategy == HubStrategy.END:
                self.host.push_to_hub()
                self.final = True
            with self.host.agreement.together():
                if args.hub_strategy != HubStrategy.END and self._due is not None and self._due != self._done:
                    logger.warning("Pushing %s, which is not on the Hub yet.", self._due)
                    self._after(self._checkpoint_push(self._due)(), self._due)
        except PushError as error:
            if self.host.is_world_process_zero():
                logger.error("%s", error)  # the result of a finished training is worth more than its push

    def checkpoint(self, folder: str) -> None:
        """Push a checkpoint in the background; left out while another is on its way, unless `hub_always_push`."""
        with self.host.agreement.together():
            if self.host.is_world_process_zero() and self.host.args.hub_strategy != HubStrategy.END:
                self._push_or_leave_out(folder)

    def _push_or_leave_out(self, folder: str) -> None:
        host, self._due = self.host, folder
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

    @property
    def _whole_model(self) -> bool:
        return not hasattr(self.host.model, "peft_config")

    def _checkpoint_push(self, checkpoint_folder: str) -> Callable[[], Pushed]:
        """
        A function that pushes a checkpoint as it is now: the files are copied before this returns.

        Raises:
            PushError: the files cannot be copied.
        """
        args, source = self.host.args, Path(checkpoint_folder)

        def fill(stage: Path) -> Adapter | None:
            adapter = copy_run(source, stage, self._whole_model)
            copy_listed(Path(args.output_dir), stage, ("README.md", "echo_run.json", "assets/*.png"))
            if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                last = args.hub_strategy == HubStrategy.CHECKPOINT
                inner = stage / ("last-checkpoint" if last else source.name)
                copy_listed(source, inner, (*ADAPTER, *TOKENIZER, *RESUME))
            if adapter is not None and args.portable_adapter:
                return _portable(adapter, self._shapes())
            return adapter

        again = Again(
            checkpoint_folder, self.host.hub_model_id or self._name(), args.hub_private_repo, args.hub_revision
        )
        message = f"Training in progress, step {self.host.state.global_step}"
        return self._prepared(again, args.hub_token, message, fill)

    def _prepared(
        self, again: Again, token: str | None, message: str, fill: Callable[[Path], Adapter | None]
    ) -> Callable[[], Pushed]:
        """
        A function that pushes what is packed now, and may run in the background.

        Args:
            again: where to, and how to push it again.
            token, message: access token; first line of the commit.
            fill: copies what is pushed into the folder it is given; its adapter.

        Raises:
            PushError: there is nothing to push, or it cannot be copied.
        """
        with ExitStack() as on_failure, last_words(again, token):
            stage = Path(tempfile.mkdtemp(prefix="echo-push-"))
            on_failure.callback(shutil.rmtree, stage, ignore_errors=True)
            adapter = fill(stage)
            parcel = pack(stage, adapter, again, None if adapter is None else self._shapes())
            on_failure.pop_all()  # the push removes it

        def push() -> Pushed:
            try:
                with last_words(again, token):
                    return send(parcel, token, message, self.patience)
            finally:
                shutil.rmtree(stage, ignore_errors=True)

        return push

    def _shapes(self) -> Base:
        """The shapes of the base, read off the model at hand and once."""
        self._base = self._base or read_base(self.host.model)
        return self._base

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


def _portable(adapter: Adapter, base: Base) -> Adapter:
    try:
        return read_adapter(make_portable(adapter, base))
    except NotPortableError:
        return adapter  # DoRA and the like keep their form; the final save says so
