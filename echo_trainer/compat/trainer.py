"""`JointTrainer`: `trl.SFTTrainer` with public names for the private joints that this package needs.

Each override below hands over to one of four objects that the trainer owns. Seen in trl 1.16 with transformers 5.23
and 5.24. A joint that is gone is named when a trainer is built, since what hangs on it would be lost without a word;
`_total_train_tokens` is the exception: without it `num_tokens` is counted by ourselves.

| private | of | why there is no public way |
|---|---|---|
| `_save_checkpoint` | transformers | a checkpoint must appear whole; callbacks come after it is written |
| `_get_output_dir` | transformers | where a checkpoint is written, for the staging folder |
| `_save_optimizer_and_scheduler`, `_load_optimizer_and_scheduler` | transformers | the echo networks belong to them |
| `_load_from_checkpoint`, `_load_rng_state` | transformers | an error of one process must end them all |
| `_load_best_model` | transformers | must not load a damaged checkpoint, and must load the echo networks |
| `_inner_training_loop` | transformers | around everything that trains, once the model is the one that is trained |
| `_wrap_model` | transformers | the last moment before an engine is given model and optimizer |
| `_run_epoch` | transformers | none may begin where a resumed run had done its last step |
| `_push_from_checkpoint`, `_finish_current_push` | transformers | pushes only listed files, and says what failed |
| `_save` | transformers | the final adapter is verified before it gets its name |
| `_prepare_dataset` | trl | rows get labels that TRL cannot give them; those that lose their answer are counted |
| `_set_signature_columns_if_needed` | trl | columns that say how rows with images are written |
| `_total_train_tokens` | trl | `num_tokens` goes on where it was after a resume |
| `accelerator.dataloader_config` | accelerate | an option that TrainingArguments cannot leave open for one loader |
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ParamSpec, Protocol, TypeVar

import transformers
import trl
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from trl import SFTTrainer

P = ParamSpec("P")
R = TypeVar("R")

_JOINTS = (
    "_save_checkpoint", "_get_output_dir", "_save_optimizer_and_scheduler", "_load_optimizer_and_scheduler",
    "_load_from_checkpoint", "_load_rng_state", "_load_best_model", "_inner_training_loop", "_wrap_model",
    "_run_epoch", "_push_from_checkpoint", "_finish_current_push", "_save", "_prepare_dataset",
    "_set_signature_columns_if_needed",
)  # fmt: skip


def require_joints(trainer_class: type = SFTTrainer) -> None:
    """
    Make sure that every private method that is overridden is still there to be called.

    Raises:
        RuntimeError: some are gone; the message names them and the installed versions.
    """
    gone = [name for name in _JOINTS if not callable(getattr(trainer_class, name, None))]
    if gone:
        raise RuntimeError(
            f"This version of echo_trainer overrides {', '.join(gone)} of trl.SFTTrainer, which trl {trl.__version__} "
            f"with transformers {transformers.__version__} does not have any more; checkpoints, adapters or pushes "
            f"would go wrong without a word. Install the tested versions (`echo-trainer env` names them), or a newer "
            f"echo_trainer."
        )


def with_signature(original: Callable[P, R]) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """`functools.wraps` of `original`, in words that type checkers understand for methods too."""
    return functools.wraps(original)


class CheckpointJoints(Protocol):
    """What happens around checkpoints; each `write`, `load` or `run` does what the Trainer does."""

    def write(self, write: Callable[[], None], run_dir: str) -> None:
        """Write a checkpoint of the current step into `run_dir`."""

    def save_optimizer(self, save: Callable[[], None], folder: str) -> None:
        """Write the optimizer's state into `folder`."""

    def load_optimizer(self, load: Callable[[], None], checkpoint: str | None) -> None:
        """Load the optimizer's state from `checkpoint` (None: training begins anew)."""

    def load(self, load: Callable[[], None]) -> None:
        """Load another part of a checkpoint."""

    def load_best(self, load: Callable[[], None]) -> None:
        """Load the best checkpoint."""

    def run_epoch(self, run: Callable[[], None]) -> None:
        """Train an epoch."""


class WrapJoints(Protocol):
    """What an engine is given to train."""

    def put_on(self) -> None:
        """Model and optimizer are about to be given to an engine, to train."""


class SaveJoints(Protocol):
    """How a model is written."""

    def write(self, folder: str, write: Callable[[str], None], state_dict: dict | None) -> None:
        """Write model and tokenizer into `folder`; `write` does what the Trainer does, into the folder it is given."""


class PushJoints(Protocol):
    """How checkpoints are pushed."""

    def checkpoint(self, folder: str) -> None:
        """Push a checkpoint."""

    def finish(self) -> None:
        """Wait for pushes in the background."""


class RowJoints(Protocol):
    """
    How rows become token ids and labels.

    Attributes:
        columns: that are kept for the collator beside those that TRL keeps.
    """

    columns: tuple[str, ...]

    def prepare(
        self,
        prepare: Callable[..., Any],
        host: Any,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        """Prepare a dataset; `prepare` does what TRL does, with the dataset and the options it is given."""


def sends_batches(accelerator: Any) -> bool:
    """Whether one process is asked to read and collate for all of them (`dispatch_batches`)."""
    return bool(accelerator.dataloader_config.dispatch_batches)


class JointTrainer(SFTTrainer):
    """
    See the module's docstring.

    Attributes:
        model, model_wrapped, train_dataset, data_collator: the Trainer's, as they are once it is built.
        checkpoints, attachment, saver, pushes, rows: what the private methods are handed over to; there before
            `__init__`.
        staging_folder: where the Trainer writes a checkpoint, in place of the run's folder; None outside of a save.
        push_is_due: whether the checkpoint that is being written is to be pushed once it has its name.
    """

    model: PeftModel | PreTrainedModel
    model_wrapped: nn.Module
    train_dataset: Any
    data_collator: Any
    checkpoints: CheckpointJoints
    attachment: WrapJoints
    saver: SaveJoints
    pushes: PushJoints
    rows: RowJoints
    staging_folder: str | None = None
    push_is_due: bool = False

    def training_loop(self, run: Callable[[], Any]) -> Any:
        """Train with `run`, and return what it returns. With `auto_find_batch_size` it may be called again."""
        return run()

    def save_gathered(self, folder: str, state_dict: dict) -> None:
        """Write a model whose tensors an engine has gathered; goes through `saver.write`."""
        self._save(folder, state_dict=state_dict)

    @contextmanager
    def whole_batches(self) -> Iterator[None]:
        """Data loaders made inside hand batches on as they are, unless the user wants them sent from one process."""
        options = self.accelerator.dataloader_config
        before = options.dispatch_batches
        if not before or self.accelerator.num_processes == 1:
            options.dispatch_batches = False
        try:
            yield
        finally:
            options.dispatch_batches = before

    @property
    def tokens_trained_on(self) -> int:
        """Real tokens of all steps so far, over all processes (`num_tokens` in the log)."""
        return getattr(self, "_total_train_tokens", 0)

    @tokens_trained_on.setter
    def tokens_trained_on(self, count: int) -> None:
        self._total_train_tokens = count

    # The joints

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        return self.training_loop(partial(super()._inner_training_loop, *args, **kwargs))

    def _wrap_model(self, model: Any, training: bool = True, **kwargs: Any) -> Any:
        if training:
            self.attachment.put_on()
        return super()._wrap_model(model, training=training, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_dir = super()._get_output_dir(trial=trial)
        self.checkpoints.write(partial(super()._save_checkpoint, model, trial), run_dir)

    def _get_output_dir(self, trial: Any) -> str:
        return self.staging_folder or super()._get_output_dir(trial=trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.checkpoints.save_optimizer(partial(super()._save_optimizer_and_scheduler, output_dir), output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self.checkpoints.load_optimizer(partial(super()._load_optimizer_and_scheduler, checkpoint), checkpoint)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.checkpoints.load(partial(super()._load_from_checkpoint, *args, **kwargs))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        self.checkpoints.load(partial(super()._load_rng_state, checkpoint))

    def _load_best_model(self) -> None:
        self.checkpoints.load_best(super()._load_best_model)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self.checkpoints.run_epoch(partial(super()._run_epoch, *args, **kwargs))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.staging_folder:  # pushed when it has its name
            self.push_is_due = True
        else:
            self.pushes.checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        self.pushes.finish()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = output_dir if output_dir is not None else self.args.output_dir
        assert folder is not None  # the arguments put a name there
        self.saver.write(folder, partial(super()._save, state_dict=state_dict), state_dict)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        options = (processing_class, args, packing, formatting_func, dataset_name)
        return self.rows.prepare(super()._prepare_dataset, self, dataset, *options)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*dict.fromkeys([*self._signature_columns, *self.rows.columns])]
