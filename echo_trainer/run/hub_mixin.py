"""The Trainer's pushes: saved locally first, only listed files, and no failure is silent.

Overrides of `transformers.Trainer`, each for one reason:

- `init_hf_repo`: a Hub that cannot be reached before training is a warning, not the end of the run.
- `push_to_hub`: local save first, then `echo_trainer.hub.push.push_folder`.
- `push_checkpoint`: the same list of files and the same care, in the background.
- `finish_pushes`: says what became of the background pushes.
- `train`: leaves the newest adapter on the Hub, also with `hub_strategy="end"` or when a background push failed.
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

from ..adapter.folder import AdapterError
from ..adapter.portable import NotPortableError, make_portable
from ..hub.client import Patience, PushError, in_words
from ..hub.files import ADAPTER, RESUME, TOKENIZER, copy_listed, copy_run
from ..hub.push import Again, Pushed, RefusedError, last_words, preflight, push_copy, push_folder
from ..passes.step import detach_networks

logger = logging.getLogger(__name__)


class EchoHubMixin:
    """Pushing for `EchoSFTTrainer`."""

    hub_patience = Patience()
    _hub_worker: ThreadPoolExecutor | None = None
    _hub_jobs: tuple[tuple[str, Future], ...] = ()
    _hub_due: str | None = None  # the newest checkpoint that should be on the Hub
    _hub_done: str | None = None  # the newest one that is

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Look whether pushing will work, and make the repository; what is wrong is a warning here."""
        self.push_in_progress = None  # the Trainer's own bookkeeping, which stays empty
        if not self.is_world_process_zero():
            return
        self.hub_model_id = self._hub_name()
        private = private if private is not None else self.args.hub_private_repo
        token = token or self.args.hub_token
        try:
            target = preflight(self.hub_model_id, private, token, self.hub_patience, self.args.hub_revision)
            self.hub_model_id = target.repo_id
        except Exception as error:
            reason = str(error) if isinstance(error, RefusedError) else in_words(error, (token,) if token else ())
            logger.warning(
                "Pushing to %s will not work as things are: %s. Training goes on, and the adapter is saved in %s; "
                "the push is tried again at the end.",
                self.hub_model_id,
                reason,
                self.args.output_dir,
            )

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        base_model: str | None = None,
        **kwargs: Any,
    ) -> Pushed | Future | None:
        """
        Save the adapter in `output_dir`, then push it and compare its checksums.

        Args:
            commit_message: first line of the commit.
            blocking: False returns a `Future` of the result; a failure is then logged as well.
            token: write token; None takes `hub_token`, HF_TOKEN or that of `hf auth login`.
            revision: branch; None takes `hub_revision`.
            private: as in `push_folder`; None takes `hub_private_repo`.
            base_model: id of the base on the Hub, where the run was trained on a local folder.
            kwargs: as in `create_model_card`: `dataset_name`.

        Returns:
            What is on the Hub now; None on processes other than the first.

        Raises:
            PushError: not pushed; the files are in `output_dir`, and the message holds the command to push again.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.dataset_name = kwargs.get("dataset_name") or getattr(self, "dataset_name", None)  # for the card
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.finish_pushes(lambda: None)

        def push() -> Pushed:
            return push_folder(
                self.args.output_dir,
                self.hub_model_id or self._hub_name(),
                private=private if private is not None else self.args.hub_private_repo,
                token=token or self.args.hub_token,
                revision=revision or self.args.hub_revision,
                base_model=base_model,
                whole_model=not hasattr(self.model, "peft_config"),
                commit_message=commit_message or "End of training",
                patience=self.hub_patience,
            )

        if not blocking:
            return self._in_background("the final push", push, self._hub_due)
        pushed = push()
        self._after(pushed, self._hub_due)
        return pushed

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, then see to it that the newest adapter is on the Hub if `push_to_hub` is set."""
        result = super().train(*args, **kwargs)
        if not self.args.push_to_hub:
            return result
        detach_networks(self.accelerator.unwrap_model(self.model))  # what is saved now is final
        try:
            if self.args.hub_strategy == HubStrategy.END:
                self.push_to_hub()
            elif self._hub_due != self._hub_done:
                logger.warning("Pushing %s, which is not on the Hub yet.", self._hub_due)
                self._after(self._checkpoint_push(self._hub_due)(), self._hub_due)
        except PushError as error:
            logger.error("%s", error)  # the result of a finished training is worth more than its push
        return result

    def _hub_name(self) -> str:
        return self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    def push_checkpoint(self, checkpoint_folder: str, push: Callable[[], None]) -> None:
        """Push a checkpoint in the background; left out while another is on its way, unless `hub_always_push`."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        self._hub_due = checkpoint_folder
        if not self.args.hub_always_push and any(not job.done() for _, job in self._hub_jobs):
            return  # `train` makes up for it in the end, if no later one does
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        try:
            ours = self._checkpoint_push(checkpoint_folder)
        except PushError as error:
            logger.error("%s", error)
        else:
            self._in_background(f"the push of {Path(checkpoint_folder).name}", ours, checkpoint_folder)

    def _checkpoint_push(self, checkpoint_folder: str) -> Any:
        """
        A function that pushes a checkpoint as it is now: the files are copied before this returns.

        Raises:
            PushError: the files cannot be copied.
        """
        args, source, model = self.args, Path(checkpoint_folder), self.model
        repo_id = self.hub_model_id or self._hub_name()
        again = Again(checkpoint_folder, repo_id, args.hub_private_repo, args.hub_revision)
        whole_model = not hasattr(model, "peft_config")
        with ExitStack() as on_failure, last_words(again, args.hub_token):
            stage = Path(tempfile.mkdtemp(prefix="echo-push-"))
            on_failure.callback(shutil.rmtree, stage, ignore_errors=True)
            copy_run(source, stage, whole_model)
            copy_listed(Path(args.output_dir), stage, ("README.md", "echo_run.json", "assets/*.png"))
            if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                last = args.hub_strategy == HubStrategy.CHECKPOINT
                inner = stage / ("last-checkpoint" if last else source.name)
                copy_listed(source, inner, (*ADAPTER, *TOKENIZER, *RESUME))
            on_failure.pop_all()  # the push removes it
        message = f"Training in progress, step {self.state.global_step}"

        def push() -> Pushed:
            try:
                with last_words(again, args.hub_token):
                    if args.portable_adapter and not whole_model:
                        _try_portable(stage, model.get_base_model().config)
                    options = (args.hub_private_repo, args.hub_token, args.hub_revision, None, message)
                    return push_copy(stage, repo_id, *options, self.hub_patience)
            finally:
                shutil.rmtree(stage, ignore_errors=True)

        return push

    def _in_background(self, name: str, push: Any, checkpoint: str | None = None) -> Future:
        if self._hub_worker is None:
            self._hub_worker = ThreadPoolExecutor(1, thread_name_prefix="echo-push")

        def run() -> Pushed:
            try:
                pushed = push()
            except BaseException as error:
                logger.error("In the background, %s failed. %s", name, error)
                raise
            self._after(pushed, checkpoint)
            return pushed

        job = self._hub_worker.submit(run)
        self._hub_jobs = (*self._hub_jobs, (name, job))
        return job

    def _after(self, pushed: Pushed, checkpoint: str | None) -> None:
        self._hub_done = checkpoint
        self.hub_model_id = pushed.repo_id
        for note in pushed.notes:
            logger.warning("%s", note)

    def finish_pushes(self, finish: Callable[[], None]) -> None:
        """Wait for the background pushes, and say again which of them failed."""
        jobs, self._hub_jobs = self._hub_jobs, ()
        if any(not job.done() for _, job in jobs):
            logger.warning("Waiting for %s.", jobs[-1][0])
        failed = [name for name, job in jobs if job.exception() is not None]
        if failed:
            logger.error(
                "%d of %d background pushes failed: %s. Their errors are above; the files are in %s.",
                len(failed),
                len(jobs),
                ", ".join(failed),
                self.args.output_dir,
            )


def _try_portable(folder: Path, base: Any) -> None:
    try:
        make_portable(folder, base)
    except NotPortableError:
        pass  # DoRA and the like keep their form; the final save says so
    except AdapterError as error:
        raise RefusedError(str(error)) from error
