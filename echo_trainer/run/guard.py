"""Numerical guard: what is not finite in the echo pass never reaches a weight.

After the backward pass of the last micro-batch of an optimizer step the losses and the gradients are looked at, once:
what is not finite stays so when more is added to it. If something is not finite, the gradients of the step are thrown
away and its micro-batches are run again, each looked at by itself; one whose echo is at fault is run without it:
CE_plain alone. That is counted (`echo/nonfinite`), said, and ends the run when it happens again and again. A plain
loss that is not finite ends the run at once: no step can follow from it.

fp16 with a scaler: infinite gradients are how the scaler finds its scale, so it looks at those and skips the step (see
`scaler.py`).
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from ..method.losses import NonFiniteLossError
from ..method.plan import EchoPlan
from ..passes.memory import explain_out_of_memory
from .answers import PLAN_KEY, with_plan
from .at_work import unlike_planned
from .host import Host
from .scaler import ScalerWatch

logger = logging.getLogger(__name__)

MAX_IN_A_ROW = 10
"""Micro-batches in a row whose echo pass may be non-finite before the run ends."""


@dataclass(frozen=True)
class MicroBatch:
    """One of an optimizer step: what runs it forward and backward, and what it runs on."""

    run: Callable[[dict[str, Any]], Tensor]
    inputs: dict[str, Any]
    plan: EchoPlan

    def loss(self, plan: EchoPlan) -> Tensor:
        """Run it, with its own plan or another one."""
        with explain_out_of_memory(self.inputs, plan):
            return self.run(with_plan(self.inputs, plan))


class Guard:
    """
    The guarded training step of a trainer.

    Attributes:
        nonfinite_in_a_row: micro-batches up to now whose echo pass was not finite, one after another.
    """

    def __init__(self, host: Host):
        self.host = host
        self.nonfinite_in_a_row = 0
        self.scaler = ScalerWatch(host)
        self._step: list[MicroBatch] = []  # the micro-batches of the optimizer step so far
        self._losses: list[Tensor] = []  # what they gave
        self._labels: list[Tensor] = []  # of each: NaN where its labels are not those that were planned, else zero
        self._before: tuple[dict[str, Tensor], tuple] = ({}, ())  # gradients and metrics before the step

    def begin(self) -> None:
        """Forget what an earlier run of the trainer counted."""
        self.nonfinite_in_a_row = 0
        self.scaler = ScalerWatch(self.host)
        self._step, self._losses, self._labels = [], [], []

    def step(self, run: Callable[[dict[str, Any]], Tensor], inputs: dict[str, Any]) -> Tensor:
        """
        One micro-batch, forward and backward, guarded as the module's docstring says.

        Args:
            run: the Trainer's step: takes the inputs, gives the loss and leaves gradients.
            inputs: of the micro-batch, with its plan where the echo is on.

        Returns:
            The loss of the micro-batch. Where some had to be run again the last one makes the sum right.

        Raises:
            NonFiniteLossError: the plain loss is not finite, or the echo pass was not in many steps in a row.
            ValueError: `compute_loss` was given other labels than those that were planned.
        """
        plan: EchoPlan | None = inputs.get(PLAN_KEY)
        if self.host.echo is None or plan is None:
            return run(inputs)
        self.scaler.look()
        if self._checks_loss_only():
            return MicroBatch(run, inputs, plan).loss(plan)
        if not self._step:
            self._before = self._copy_gradients(), self.host.echo_metrics.snapshot()
        self._step.append(MicroBatch(run, inputs, plan))
        loss = self._step[-1].loss(plan)
        self._losses.append(loss)
        if not self.host.accelerator.sync_gradients:
            return _finite_or_zero(loss)
        step, losses, labels, before = self._step, self._losses, self._labels, self._before
        self._step, self._losses, self._labels, self._before = [], [], [], ({}, ())
        if self._all_finite([*losses, *labels]):
            if any(_has_echo(each.plan) for each in step):
                self.nonfinite_in_a_row = 0
            return loss
        self._check_labels(labels)
        total = self._run_again(step, before)
        for logged in losses[:-1]:
            total = total - _finite_or_zero(logged).to(_finest(logged.device))
        return total

    def _run_again(self, step: list[MicroBatch], before: tuple[dict[str, Tensor], tuple]) -> Tensor:
        """
        The loss of an optimizer step whose losses or gradients were not finite, run again.

        Args:
            step: its micro-batches; where there is one only, it is known which is at fault.
            before: gradients and metrics before the step.
        """
        self._put_gradients(before[0])
        self.host.echo_metrics.restore(before[1])
        if len(step) > 1:
            logger.warning(
                "Step %d: a loss or a gradient is not finite. Its %d micro-batches are run again, one by one.",
                self.host.state.global_step,
                len(step),
            )
        found: list[Tensor] = []
        for each in step:
            gradients, metrics = self._copy_gradients(), self.host.echo_metrics.snapshot()
            if len(step) > 1:
                loss = each.loss(each.plan)
                if self._all_finite([loss]):
                    self.nonfinite_in_a_row = 0 if _has_echo(each.plan) else self.nonfinite_in_a_row
                    found.append(loss)
                    continue
                self._put_gradients(gradients)
                self.host.echo_metrics.restore(metrics)
            self._count_non_finite()
            loss = each.loss(each.plan.without_echo())
            if not self._all_finite([loss]):
                self._put_gradients(before[0])
                raise NonFiniteLossError(
                    f"The plain loss or its gradients are not finite at step {self.host.state.global_step} (loss "
                    f"{float(loss):g}), without any echo: training has diverged or a sample overflows the model's "
                    f"dtype. No weight was changed by this step. Start a new run from the last checkpoint's adapter, "
                    f"PeftModel.from_pretrained(model, CHECKPOINT, is_trainable=True), with a lower learning_rate, "
                    f"max_grad_norm=1.0 or bf16 instead of fp16; a resumed run would keep the old rate."
                )
            found.append(loss)
        return sum(found[1:], found[0])

    def forward(
        self, run: Callable[[EchoPlan], dict[str, Tensor]], plan: EchoPlan, labels: Tensor | None
    ) -> tuple[EchoPlan, dict[str, Tensor]]:
        """
        The forward of a micro-batch; that of the plain loss where only the loss is looked at and it is not finite.

        Args:
            run: the forward of the wrapped model for a plan.
            plan: of the micro-batch.
            labels: that `compute_loss` was given for it.

        Returns:
            The plan that was used, and its output.

        Raises:
            ValueError: the labels are not those of the plan, and nobody looks at the step later.
        """
        output = run(plan)
        unlike = [] if labels is None else [unlike_planned(labels, plan)]
        if self._step:
            self._labels += unlike
            return plan, output
        if not self._checks_loss_only():  # a step of somebody else, who does not call that of the guard
            self._check_labels(unlike)
            return plan, output
        if plan.layout is None:
            return plan, output
        if self._agreed_finite([output["objective"], *unlike]):
            self.nonfinite_in_a_row = self.nonfinite_in_a_row if plan.weightless else 0
            return plan, output
        self._check_labels(unlike)
        self._count_non_finite()
        plan = plan.without_echo()
        return plan, run(plan)

    def _checks_loss_only(self) -> bool:
        """
        Whether only the loss is looked at, in `compute_loss` and before its backward pass, and not the gradients.

        DeepSpeed steps inside its backward, and FSDP2 keeps the gradients of earlier micro-batches where nobody can
        put them back.
        """
        return self.host.is_deepspeed_enabled or (
            self.host.is_fsdp_enabled and self.host.args.gradient_accumulation_steps > 1
        )

    def _check_labels(self, unlike: list[Tensor]) -> None:
        """Raise where labels were not those that were planned, on any process. Every process must call it."""
        if unlike and not self._agreed_finite(unlike):
            raise ValueError(
                "compute_loss was given other `labels` than those that this micro-batch was planned with, and both "
                "losses are computed on those of the plan. Mask labels in the dataset or in the data collator instead."
            )

    def _count_non_finite(self) -> None:
        """Count a micro-batch whose echo was thrown away; say so now and then, and stop when it goes on."""
        self.nonfinite_in_a_row += 1
        self.host.echo_metrics.count_non_finite()
        logger.warning(
            "Step %d: the echo pass gave a loss or gradients that are not finite. The step goes on with the plain "
            "loss (%d in a row; the run stops at %d).",
            self.host.state.global_step,
            self.nonfinite_in_a_row,
            MAX_IN_A_ROW,
        )
        if self.nonfinite_in_a_row >= MAX_IN_A_ROW:
            raise NonFiniteLossError(
                f"The echo pass was not finite in {MAX_IN_A_ROW} micro-batches in a row, up to step "
                f"{self.host.state.global_step}. The adapter's weights are intact: those steps used the plain loss. "
                f"Start a new run from the last checkpoint's adapter, PeftModel.from_pretrained(model, CHECKPOINT, "
                f"is_trainable=True), with a lower echo_learning_rate, bf16 instead of fp16, or without the echo "
                f"(echo_p_start=0 and echo_p_end=0); a resumed run would keep the old rates."
            )

    def _all_finite(self, losses: list[Tensor]) -> bool:
        """Whether losses and gradients are finite on every process; the same answer on all of them."""
        # fp16 scales the loss so high that infinite gradients are normal: the scaler looks at those itself.
        gradients = [] if self.host.accelerator.scaler is not None else map(_local, self._gradients().values())
        # One maximum over all gradients: looking at each would launch hundreds of kernels a step. With FSDP2 a process
        # may hold no row of a small matrix, and nothing has no maximum.
        largest = get_total_norm([gradient for gradient in gradients if gradient.numel()], norm_type=math.inf)
        return self._agreed_finite([*losses, largest])

    def _agreed_finite(self, tensors: list[Tensor]) -> bool:
        """Whether all are finite on every process. Every process must call it."""
        finite = torch.stack([torch.isfinite(x).all().to(tensors[0].device) for x in tensors]).all()
        if self.host.accelerator.num_processes > 1:
            finite = self.host.accelerator.reduce((~finite).float(), reduction="sum") == 0
        return bool(finite)

    def _gradients(self) -> dict[str, Tensor]:
        return {
            name: p.grad for name, p in self.host.model.named_parameters() if p.requires_grad and p.grad is not None
        }

    def _copy_gradients(self) -> dict[str, Tensor]:
        """Gradients as they are; nothing before the first micro-batch of a step."""
        return {name: gradient.clone() for name, gradient in self._gradients().items()}

    @torch.no_grad()
    def _put_gradients(self, gradients: dict[str, Tensor]) -> None:
        for name, parameter in self.host.model.named_parameters():
            if parameter.grad is not None:
                if name in gradients:  # in place: DDP may hold a view of it
                    parameter.grad.copy_(gradients[name])
                else:
                    parameter.grad = None


def _local(gradient: Any) -> Tensor:
    """The part of a sharded gradient that this process holds."""
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient


def _has_echo(plan: EchoPlan) -> bool:
    """Whether a micro-batch runs an echo pass that counts."""
    return plan.layout is not None and not plan.weightless


def _finite_or_zero(loss: Tensor) -> Tensor:
    """The loss, or zero where it is not finite; the device alone knows."""
    return torch.where(torch.isfinite(loss), loss, 0.0)


def _finest(device: torch.device) -> torch.dtype:
    """The finest dtype of a device."""
    return torch.float32 if device.type == "mps" else torch.float64
