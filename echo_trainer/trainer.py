"""`EchoSFTTrainer`: `trl.SFTTrainer` with an echo pass. Reads as the diagram in `echo_trainer/__init__.py`.

The only subclass of TRL's trainer with behaviour of its own. It computes the loss and hands everything else over:

| override | to | why |
|---|---|---|
| `get_train_dataloader`, `get_batch_samples` | `run.batches` | routes can be drawn once the step is known |
| `training_step` | `run.guard` | what is not finite never reaches a weight |
| `save_model`, `create_model_card` | `run.save` | the final adapter is verified, described, moved into place whole |
| `init_hf_repo`, `push_to_hub` | `run.pushes` | only listed files, and no failure is silent |
| `evaluation_loop` | `run.held_out` | what the echo pass says on the same rows, beside TRL's figures |
| `compute_loss` | | one forward with both passes; TRL's without a plan (evaluation, echo off) |
| `create_optimizer` | | a learning rate of their own for the echo networks |
| `log` | `run.metrics` | the echo's metrics beside TRL's |

Private joints of TRL and transformers (checkpoints, resuming) are handed over in `compat.trainer`; `labelling.trainer`
adds `distill` and the loss on a teacher's distributions.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from trl import SFTTrainer

from .compat.trainer import require_joints, with_signature
from .compat.versions import warn_of_newer
from .config import EchoSFTConfig, as_echo_config, router_loss_weight
from .labelling.soft import SoftLabels
from .labelling.trainer import DistillingTrainer
from .method.losses import shown_as
from .method.network import EchoNetworks
from .passes.memory import now_running
from .passes.setup import EchoSetup
from .run.agreement import Agreement
from .run.answers import PLAN_KEY, backbone_inputs
from .run.at_work import AtWork
from .run.attachment import Attachment
from .run.batches import Batches
from .run.building import loss_terms_of, set_up_echo
from .run.checkpoints import Checkpoints
from .run.decode import DecodedBatch, decode
from .run.first_step import FirstStep
from .run.frozen_prefix import PrefixKeeper
from .run.guard import Guard
from .run.held_out import HeldOut
from .run.loop import train_with_echo
from .run.metrics import EchoMetrics
from .run.optimizer import give_own_rate
from .run.pass_choice import PassChoice
from .run.probation import Probation
from .run.pushes import Pushes
from .run.resume import base_fingerprint
from .run.rows import Rows
from .run.save import Saver
from .run.spent import Spent
from .run.validation import check_arguments


class EchoSFTTrainer(DistillingTrainer):
    """
    Supervised fine-tuning with Echo-LoRA; a drop-in replacement for `trl.SFTTrainer`.

    ```python
    from echo_trainer import EchoSFTConfig, EchoSFTTrainer

    trainer = EchoSFTTrainer(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        args=EchoSFTConfig(output_dir="out"),
        train_dataset=dataset,
        peft_config=LoraConfig(target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()
    ```

    Arguments are those of `SFTTrainer`; `args` is an [`EchoSFTConfig`] (an `SFTConfig` is turned into one), and
    `unlabeled_dataset` holds rows with `prompt` only, which `distill()` has answered and learns from. The saved
    adapter is an ordinary PEFT adapter: the echo networks exist during training only.

    Raises:
        ValueError: the model, the adapter, the dataset or an option cannot work with the echo; nothing is written.
    """

    _tag_names = ["trl", "sft", "echo-lora"]
    _name = "Echo-LoRA"
    networks_class: type[EchoNetworks] = EchoNetworks
    args: EchoSFTConfig
    checkpoints: Checkpoints
    attachment: Attachment
    saver: Saver
    pushes: Pushes

    @with_signature(SFTTrainer.__init__)
    def __init__(self, *args: Any, unlabeled_dataset: Any = None, **kwargs: Any):
        self.unlabeled_dataset, self.soft = unlabeled_dataset, SoftLabels(self)
        call = inspect.signature(SFTTrainer.__init__).bind(self, *args, **kwargs).arguments
        call.pop("self")
        require_joints()
        warn_of_newer()
        call["args"] = config = as_echo_config(call.get("args"), call["model"])
        if config.echo_enabled:
            check_arguments(call["model"], call.get("peft_config"), call.get("compute_loss_func"))
        self.echo: EchoSetup | None = None
        self.pass_choice: PassChoice | None = None
        self.loss_terms = loss_terms_of(config)
        self.dataset_name: str | None = None
        self.agreement = Agreement()
        self.echo_metrics = EchoMetrics(self.agreement)
        self.batches, self.guard, self.checkpoints = Batches(self), Guard(self), Checkpoints(self)
        self.saver, self.pushes, self.prefix = Saver(self), Pushes(self), PrefixKeeper(self)
        self.attachment, self.first_step, self.at_work = Attachment(self), FirstStep(self), AtWork()
        self.held_out, self.probation = HeldOut(self, self.batches.compare_passes), Probation(self)
        self.spent = Spent(self)
        self.rows = rows = Rows(config, call.get("formatting_func"))
        with rows.kept_from_trl(call):
            super().__init__(**call)
        if call.get("data_collator") is None:
            collator = rows.collator(self.data_collator, self.processing_class, self.train_dataset)
            self.data_collator = self.soft.collator(collator)
        self.base_fingerprint = base_fingerprint(self.model)
        if config.echo_enabled:
            self.held_out.set_aside(config.echo_held_out)
            set_up_echo(self)

    @property
    def echo_networks(self) -> EchoNetworks | None:
        """The echo networks, None where the echo is off."""
        return self.echo.networks if self.echo is not None else None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """
        Train as TRL does. The echo networks are part of the model only meanwhile, and only while nobody looks at it.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the last whole one in `output_dir`.

        Raises:
            ValueError: the checkpoint is damaged, or belongs to another model, batch size or echo; an option that was
                set since cannot work.
            EchoNotTrainedError: what was replaced in this trainer keeps the echo out (see `run.first_step`).
        """
        resume = self.checkpoints.resume_point(resume_from_checkpoint)
        result = super().train(resume, *args, **kwargs)
        self.pushes.after_training()
        return result

    def training_loop(self, run: Callable[[], Any]) -> Any:
        """Train as the options say now; `run` is the Trainer's loop."""
        return self.prefix.training(partial(train_with_echo, self, run))

    # Handed over

    def get_train_dataloader(self):
        """TRL's training data loader; with the echo on its batches know where their answers are."""
        return self.batches.loader(super().get_train_dataloader)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step, planned now, when the step is known."""
        taken = self.batches.of_a_step(super().get_batch_samples, epoch_iterator, num_batches, device)
        self.first_step.plans += sum(PLAN_KEY in batch for batch in taken[0])
        return taken

    def decode_batch(self, batch: dict[str, Any] | None = None) -> DecodedBatch:
        """
        A training batch as text: of each row the prompt and the answer, its boundary, and whether it gets an echo.

        Args:
            batch: one of `get_train_dataloader()`; None takes the first. The routes are those of the next step.
        """
        return decode(self, batch)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One micro-batch, forward and backward, guarded against what is not finite."""
        run = partial(super().training_step, model, num_items_in_batch=num_items_in_batch)
        return self.guard.step(partial(self.at_work.step, run), inputs)

    def evaluate(self, *args: Any, **kwargs: Any):
        """Evaluate as TRL does: the plain path of the model, without the echo networks."""
        with self.attachment.evaluating():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any):
        """Predict as TRL does: the plain path of the model, without the echo networks."""
        with self.attachment.evaluating():
            return super().predict(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save an ordinary PEFT adapter with its card and record into `output_dir` (None: that of the arguments)."""
        with self.attachment.hidden():
            self.saver.save_model(super().save_model, self.save_gathered, output_dir, _internal_call)

    def evaluation_loop(self, dataloader, description: str, *args: Any, **kwargs: Any):
        """TRL's evaluation of the plain path; `evaluate` also says how the echo pass predicts the same rows."""
        output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        return self.held_out.added_to(output, dataloader, description, **kwargs)

    # The step

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """
        L = (1 / N) sum_i w_i [ CE_plain + r_i (CE_echo + lambda_kd KD) ], N the answer tokens of the global batch.

        L, logged as `echo/objective`, is what is trained on, by its gradient. The value, logged as `loss`, is that of
        its plain part, the loss of `SFTTrainer`. Batches without a plan (evaluation, echo off) take TRL's loss.
        """
        plan = self.at_work.plan_for(inputs)
        if plan is None:
            with self.prefix.step(self.at_work, inputs):
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        plan = plan.to(inputs["input_ids"].device)
        for_backbone = backbone_inputs(inputs)
        router_weight = router_loss_weight(self.args, self.model.config)
        if router_weight is not None:
            for_backbone["output_router_logits"] = True
        with self.prefix.step(self.at_work, inputs):
            plan, output = self.guard.forward(
                lambda plan: model(**for_backbone, echo_plan=plan), plan, inputs.get("labels")
            )
        now_running("backward pass")
        n_items = len(plan.labels_N) if num_items_in_batch is None else num_items_in_batch
        loss = shown_as(output["objective"], output["ce_plain"]) / torch.as_tensor(n_items).clamp(min=1)
        # `num_items_in_batch` counts the tokens of every process, and DDP averages gradients over them.
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        if router_weight is not None and "aux_loss" in output:
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + router_weight * output["aux_loss"] / steps
        self.echo_metrics.add(output, plan)
        self.first_step.count(plan)
        self.probation.count(plan, tuple(inputs["input_ids"].shape))
        if return_outputs:
            with torch.no_grad():
                return loss, model(**for_backbone)
        return loss

    def create_optimizer(self, *args: Any, **kwargs: Any):
        """TRL's optimizer, for the echo networks as well; with `echo_learning_rate` they have groups of their own."""
        new = self.optimizer is None
        with self.attachment.attached():
            optimizer = super().create_optimizer(*args, **kwargs)
        if new and self.echo is not None and self.args.echo_learning_rate is not None:
            give_own_rate(optimizer, list(self.echo.networks.parameters()), self.args.echo_learning_rate)
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as TRL does, with the echo's metrics of the steps since the last log."""
        if self.echo is not None and ("loss" in logs or "train_runtime" in logs):
            metrics = self.echo_metrics.drain()
            if metrics:
                self.tokens_trained_on += int(metrics.pop("input_tokens"))
                logs.update(metrics, num_tokens=self.tokens_trained_on)
        super().log(logs, start_time)
