"""`EchoSFTTrainer`: `trl.SFTTrainer` with an echo pass. Reads as the diagram in `echo_trainer/__init__.py`.

The only subclass of TRL's trainer with behaviour of its own. It computes the loss and hands everything else over:

| override | to | why |
|---|---|---|
| `get_train_dataloader`, `get_batch_samples` | `run.batches` | routes can be drawn once the step is known |
| `training_step` | `run.guard` | what is not finite never reaches a weight |
| `save_model`, `create_model_card` | `run.save` | the final adapter is verified, described, moved into place whole |
| `init_hf_repo`, `push_to_hub` | `run.pushes` | only listed files, and no failure is silent |
| `compute_loss` | | one forward with both passes; TRL's without a plan (evaluation, echo off) |
| `create_optimizer` | | a learning rate of their own for the echo networks |
| `log` | `run.metrics` | the echo's metrics beside TRL's |

Private joints of TRL and transformers (checkpoints, resuming) are handed over in `compat.trainer`.
"""

import functools
import inspect
import logging
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from trl import SFTTrainer

from .compat.checkpointing import require_replay
from .compat.trainer import JointTrainer, require_joints
from .compat.versions import warn_of_newer
from .config import as_echo_config, router_loss_weight
from .hub.push import Pushed
from .method.depth import resolve_layers
from .method.losses import Distillation
from .method.network import EchoNetworks
from .options import CKA
from .passes.layers import decoder_layers, find_sites
from .passes.memory import now_running
from .passes.setup import EchoSetup
from .passes.shape import model_shape
from .passes.step import ECHO_MODULE, attach_networks, detach_networks, install_echo_forward
from .run.agreement import Agreement
from .run.batches import Batches
from .run.checkpoints import Checkpoints
from .run.collate import PLAN_KEY, EchoCollator
from .run.guard import Guard
from .run.lockstep import checkpoint_without_reentry, needs_lockstep
from .run.metrics import EchoMetrics, input_tokens
from .run.optimizer import take_in
from .run.pass_choice import PassChoice
from .run.pushes import Pushes
from .run.resume import base_fingerprint
from .run.save import Saver
from .run.validation import check_arguments, check_dataset, check_model, warn_of_lost_answers
from .selection.use import layers_by_cka

logger = logging.getLogger(__name__)

# Inputs of a batch that are not arguments of the backbone.
_NOT_FOR_THE_BACKBONE = ("labels", "shift_labels")


class EchoSFTTrainer(JointTrainer):
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

    Arguments are those of `SFTTrainer`; `args` is an [`EchoSFTConfig`] (an `SFTConfig` is turned into one). The saved
    adapter is an ordinary PEFT adapter: the echo networks exist during training only.

    Raises:
        ValueError: the model, the adapter, the dataset or an option cannot work with the echo; nothing is written.
    """

    _tag_names = ["trl", "sft", "echo-lora"]
    _name = "Echo-LoRA"
    networks_class = EchoNetworks

    @functools.wraps(SFTTrainer.__init__)
    def __init__(self, *args: Any, **kwargs: Any):
        call = inspect.signature(SFTTrainer.__init__).bind(self, *args, **kwargs).arguments
        call.pop("self")
        require_joints()
        warn_of_newer()
        call["args"] = config = as_echo_config(call.get("args"), call["model"])
        if config.echo_enabled:
            check_arguments(call["model"], call.get("peft_config"), call.get("compute_loss_func"))
        detach_networks(call["model"])  # those of an earlier trainer
        self.echo: EchoSetup | None = None
        self.pass_choice: PassChoice | None = None
        self.dataset_name: str | None = None
        self.echo_metrics = EchoMetrics()
        self.batches, self.guard, self.checkpoints = Batches(self), Guard(self), Checkpoints(self)
        self.saver, self.pushes = Saver(self), Pushes(self)
        super().__init__(**call)
        self.base_fingerprint = base_fingerprint(self.model)
        if config.echo_enabled:
            check_model(self.model, self.accelerator)
            check_dataset(self.train_dataset, self.data_collator)
            checkpoint_without_reentry(config)
            self._build_echo()

    @property
    def echo_networks(self) -> EchoNetworks | None:
        """The echo networks, None where the echo is off."""
        return self.echo.networks if self.echo is not None else None

    def _build_echo(self) -> None:
        args = self.args
        layers = decoder_layers(self.model, args.echo_layers)
        if args.gradient_checkpointing:
            require_replay(layers)
        named = (args.echo_source_layers, args.echo_target_layers)
        if CKA in named:
            data = self.train_dataset, self.processing_class
            named = layers_by_cka(named, self.model, *data, args.seed, args.echo_layers)
        sources, targets = resolve_layers(*named, len(layers))
        base = self.model.get_base_model()
        sites = find_sites(base, targets, args.echo_layers)
        networks = self.networks_class(
            sites,
            n_sources=len(sources),
            hidden_size=base.config.get_text_config().hidden_size,
            bottleneck=args.echo_bottleneck,
            aggregation=args.echo_aggregation,
            seed=args.resolved_echo_seed,
        ).to(args.device)
        self.echo = EchoSetup(base, networks, sites, sources, args.echo_layers)
        self._distillation = Distillation(args.echo_kd_weight, args.echo_kd_temperature, args.echo_teacher)
        install_echo_forward(self.model, self.echo, self._distillation)
        in_step = needs_lockstep(self.accelerator, self.model)
        self.data_collator = EchoCollator(self.data_collator, args.echo_positions, lockstep=in_step)
        shape = model_shape(self.echo, args.gradient_checkpointing)
        self.pass_choice = PassChoice(args.echo_pass, Agreement(), type(base).__name__, in_step, shape)
        logger.info("Echo-LoRA: echo from layers %s to %d LoRA modules of layers %s.", sources, len(sites), targets)

    def dataset_prepared(self, name: str, given: Any, prepared: Any, packed: bool, max_length: int | None) -> None:
        """Say how many examples lost their answer to truncation."""
        if not packed and isinstance(given, Dataset):
            warn_of_lost_answers(name, len(given), len(prepared), max_length)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """
        Train as TRL does. Afterwards the echo networks are no longer part of the model; this trainer keeps them.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the last whole one in `output_dir`.

        Raises:
            ValueError: the checkpoint is damaged, or belongs to another model, batch size or echo.
        """
        resume = self.checkpoints.resume_point(resume_from_checkpoint)
        with self._echo_in_the_model():
            result = super().train(resume, *args, **kwargs)
        self.pushes.after_training()
        return result

    @contextmanager
    def _echo_in_the_model(self) -> Iterator[None]:
        """The echo networks are part of the model inside, and nothing is left of an earlier run of this trainer."""
        self.checkpoints.weights_of_step = None
        if self.echo is None:
            yield
            return
        if getattr(self.model.forward, "echo_setup", None) is not self.echo:  # another trainer has the model since
            install_echo_forward(self.model, self.echo, self._distillation)
        attach_networks(self.model, self.echo)
        self.echo_metrics.clear()  # those of a run that was interrupted would be counted here
        self.guard.begin()
        self.pass_choice.begin()
        try:
            yield
        finally:
            detach_networks(self.accelerator.unwrap_model(self.model))

    # Handed over

    def get_train_dataloader(self):
        """The training data loader; with the echo on it yields uncollated examples."""
        return self.batches.loader(super().get_train_dataloader)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step, collated and planned now, when the step is known."""
        return self.batches.of_a_step(super().get_batch_samples, epoch_iterator, num_batches, device)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One micro-batch, forward and backward, guarded against what is not finite."""
        return self.guard.step(partial(super().training_step, model, num_items_in_batch=num_items_in_batch), inputs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save an ordinary PEFT adapter with its card and record into `output_dir` (None: that of the arguments)."""
        self.saver.save_model(super().save_model, output_dir, _internal_call)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None
    ) -> None:
        """Write our model card and the record of the run to `output_dir`."""
        self.saver.card(dataset_name)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Look whether pushing will work, and make the repository; what is wrong is a warning here."""
        self.push_in_progress = None  # the Trainer's own bookkeeping, which stays empty
        self.pushes.preflight(token, private)

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
            private: as in `hub.push.push_adapter`; None takes `hub_private_repo`.
            base_model: id of the base on the Hub, where the run was trained on a local folder.
            kwargs: as in `create_model_card`: `dataset_name`.

        Returns:
            What is on the Hub now; None on processes other than the first.

        Raises:
            PushError: not pushed; the files are in `output_dir`, and the message holds the command to push again.
        """
        where = {"token": token, "revision": revision, "private": private, "base_model": base_model}
        return self.pushes.push(commit_message, blocking, **where, dataset_name=kwargs.get("dataset_name"))

    # The step

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """
        L = (1 / N) sum_i [ CE_plain + r_i (CE_echo + lambda_kd KD) ], N the answer tokens of the global batch.

        Batches without a plan (evaluation, echo off) take TRL's loss, so they are exactly those of `SFTTrainer`.
        """
        plan = inputs.pop(PLAN_KEY, None)
        if plan is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        plan = plan.to(inputs["input_ids"].device)
        backbone_inputs = {k: v for k, v in inputs.items() if k not in _NOT_FOR_THE_BACKBONE}
        router_weight = router_loss_weight(self.args, self.model.config)
        if router_weight is not None:
            backbone_inputs["output_router_logits"] = True
        plan, output = self.guard.forward(lambda plan: model(**backbone_inputs, echo_plan=plan), plan)
        now_running("backward pass")
        n_items = len(plan.labels_N) if num_items_in_batch is None else num_items_in_batch
        loss = output["objective"] / torch.as_tensor(n_items).clamp(min=1)
        # `num_items_in_batch` counts the tokens of every process, and DDP averages gradients over them.
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        if "aux_loss" in output:
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + router_weight * output["aux_loss"] / steps
        self.echo_metrics.add(output, plan, input_tokens(inputs))
        if return_outputs:
            with torch.no_grad():
                return loss, model(**backbone_inputs)
        return loss

    def create_optimizer(self, *args: Any, **kwargs: Any):
        """TRL's optimizer; with `echo_learning_rate` the echo networks get parameter groups of their own."""
        mine = None if self.optimizer is not None else self.args.echo_learning_rate
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.echo is not None:
            networks = [p for name, p in self.model.named_parameters() if f"{ECHO_MODULE}." in name]
            take_in(optimizer, networks, mine, self.args.echo_learning_rate)
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as TRL does, with the echo's metrics of the steps since the last log."""
        if self.echo is not None and ("loss" in logs or "train_runtime" in logs):
            metrics = self.echo_metrics.drain(self.accelerator)
            if metrics:
                self.tokens_trained_on += int(metrics.pop("input_tokens"))
                logs.update(metrics, num_tokens=self.tokens_trained_on)
        super().log(logs, start_time)
