"""What the classes of this package need of the trainer that owns them, and nothing more."""

from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from ..method.losses import EchoLoss
from ..method.network import EchoNetworks
from ..passes.setup import EchoSetup
from .agreement import Agreement
from .metrics import EchoMetrics
from .pass_choice import PassChoice

if TYPE_CHECKING:
    from ..config import EchoSFTConfig
    from .attachment import Attachment
    from .batches import Batches
    from .checkpoints import Checkpoints
    from .first_step import FirstStep
    from .frozen_prefix import PrefixKeeper
    from .guard import Guard
    from .held_out import HeldOut
    from .probation import Probation
    from .pushes import Pushes
    from .rows import Rows
    from .spent import Spent


class SavingHost(Protocol):
    """
    A trainer, as what saves and pushes its adapter sees it.

    Attributes:
        args: with `portable_adapter`.
        state, model, control, callback_handler, hub_model_id, is_fsdp_enabled: those of `transformers.Trainer`.
        agreement, dataset_name, staging_folder: as of `Host`.
        echo: the echo's parts of the model; None without one.
    """

    args: Any
    state: Any
    control: Any
    model: Any
    callback_handler: Any
    hub_model_id: str | None
    is_fsdp_enabled: bool
    agreement: Agreement
    dataset_name: str | None
    staging_folder: str | None

    @property
    def echo(self) -> EchoSetup | None:
        """See above."""
        ...

    def is_world_process_zero(self) -> bool:
        """Whether this is the main process of the run."""
        ...

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model."""
        ...

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Save the model, then push it."""
        ...


class Host(Protocol):
    """
    `EchoSFTTrainer`, as its collaborators see it.

    Attributes:
        args, state, model, model_init, model_wrapped, accelerator, optimizer, lr_scheduler, train_dataset,
        eval_dataset, processing_class, data_collator, compute_loss_func, callback_handler, control, hub_model_id,
        is_deepspeed_enabled, is_fsdp_enabled: those of `transformers.Trainer`.
        padding_free: that of `trl.SFTTrainer`.
        staging_folder, push_is_due: see `compat.trainer.JointTrainer`.
        agreement: the talks between the processes of the run.
        echo: the echo's parts of the model, None with the echo off.
        loss_terms: what the echo pass adds to the loss.
        networks_class: of the echo networks.
        echo_metrics: sums since the last log.
        pass_choice: which form the echo pass takes; None with the echo off.
        base_fingerprint: see `resume.base_fingerprint`.
        dataset_name: public id of the training data, if the caller knows it.
        batches, guard, checkpoints, pushes, attachment, first_step, held_out, probation, prefix, spent: the
            collaborators that others call.
        tokens_trained_on: see `compat.trainer.JointTrainer`.
    """

    args: "EchoSFTConfig"
    state: Any
    control: Any
    model: Any
    model_wrapped: nn.Module
    accelerator: Any
    optimizer: Any
    lr_scheduler: Any
    train_dataset: Any
    processing_class: Any
    eval_dataset: Any
    data_collator: Any
    model_init: Any
    compute_loss_func: Any
    callback_handler: Any
    hub_model_id: str | None
    is_deepspeed_enabled: bool
    is_fsdp_enabled: bool
    padding_free: bool
    staging_folder: str | None
    push_is_due: bool
    agreement: Agreement
    echo: EchoSetup | None
    loss_terms: EchoLoss
    networks_class: type[EchoNetworks]
    echo_metrics: EchoMetrics
    pass_choice: PassChoice | None
    base_fingerprint: dict[str, str]
    dataset_name: str | None
    batches: "Batches"
    guard: "Guard"
    first_step: "FirstStep"
    checkpoints: "Checkpoints"
    pushes: "Pushes"
    attachment: "Attachment"
    held_out: "HeldOut"
    probation: "Probation"
    prefix: "PrefixKeeper"
    rows: "Rows"
    spent: "Spent"
    tokens_trained_on: int

    def is_world_process_zero(self) -> bool:
        """Whether this is the main process of the run."""
        ...

    def compute_loss_context_manager(self) -> Any:
        """Autocast, as a training step uses it."""
        ...

    def get_train_dataloader(self) -> Any:
        """The loader of the training set."""
        ...

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The loader of an evaluation set."""
        ...

    def add_callback(self, callback: Any) -> None:
        """Have a callback called from now on."""
        ...

    def remove_callback(self, callback: Any) -> None:
        """Have a callback called no more."""
        ...

    def log(self, logs: dict[str, float]) -> None:
        """Log figures of this step."""
        ...

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model."""
        ...

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Save the model, then push it."""
        ...

    def whole_batches(self) -> Any:
        """See `compat.trainer.JointTrainer`."""
        ...
