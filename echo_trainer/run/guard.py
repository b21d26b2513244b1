"""Numerical guard: what is not finite in the echo pass never reaches a weight.

After the backward pass of a micro-batch its loss and every gradient are looked at. If something is not finite, the
gradients of that micro-batch are thrown away and it is run again without the echo: CE_plain alone. That is counted
(`echo/nonfinite`), said, and ends the run when it happens again and again. A plain loss that is not finite ends the
run at once: no step can follow from it.

The look costs no extra wait: transformers reads the loss at the same place (`logging_nan_inf_filter`).

fp16 with a scaler: infinite gradients are how the scaler finds its scale, so it looks at those and skips the step. The
run ends only when it goes on skipping, long after any scale would do.
"""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from ..method.losses import NonFiniteLossError
from ..method.plan import EchoPlan
from ..passes.memory import explain_out_of_memory
from .collate import PLAN_KEY
from .host import Host

logger = logging.getLogger(__name__)

MAX_IN_A_ROW = 10
"""Micro-batches in a row whose echo pass may be non-finite before the run ends."""

MAX_SKIPPED_IN_A_ROW = 30
"""The run ends when the fp16 scaler skips so many optimizer steps in a row; each halves its scale, 2**16 at first."""


class Guard:
    """
    The guarded training step of a trainer.

    Attributes:
        nonfinite_in_a_row: micro-batches up to now whose echo pass was not finite, one after another.
    """

    def __init__(self, host: Host):
        self.host = host
        self.nonfinite_in_a_row = 0
        self._scale_seen: tuple[int, float] | None = None  # optimizer step, scale

    def begin(self) -> None:
        """Forget what an earlier run of the trainer counted."""
        self.nonfinite_in_a_row, self._scale_seen = 0, None

    def step(self, run: Callable[[dict[str, Any]], Tensor], inputs: dict[str, Any]) -> Tensor:
        """
        One micro-batch, forward and backward, guarded as the module's docstring says.

        Args:
            run: the Trainer's step: takes the inputs, gives the loss and leaves gradients.
            inputs: of the micro-batch, with its plan where the echo is on.

        Raises:
            NonFiniteLossError: the plain loss is not finite, or the echo pass was not in many steps in a row.
        """
        plan: EchoPlan | None = inputs.get(PLAN_KEY)
        if self.host.echo is None or plan is None:
            return run(inputs)
        self._watch_the_scaler()
        before = None if self._checks_loss_only() else self._copy_gradients()
        metrics = self.host.echo_metrics.snapshot()
        with explain_out_of_memory(inputs, plan):
            loss = run(inputs)
            if before is None or self._all_finite(loss):
                if before is not None and plan.layout is not None and not plan.weightless:
                    self.nonfinite_in_a_row = 0
                return loss
            self._put_gradients(before)
            self.host.echo_metrics.restore(metrics)
            self._count_non_finite()
            loss = run({**inputs, PLAN_KEY: plan.without_echo()})
        if not self._all_finite(loss):
            self._put_gradients(before)
            raise NonFiniteLossError(
                f"The plain loss or its gradients are not finite at step {self.host.state.global_step} (loss "
                f"{float(loss):g}), without any echo: training has diverged or a sample overflows the model's dtype. "
                f"No weight was changed by this step. Start a new run from the last checkpoint's adapter, "
                f"PeftModel.from_pretrained(model, CHECKPOINT, is_trainable=True), with a lower learning_rate, "
                f"max_grad_norm=1.0 or bf16 instead of fp16; a resumed run would keep the old rate."
            )
        return loss

    def forward(
        self, run: Callable[[EchoPlan], dict[str, Tensor]], plan: EchoPlan
    ) -> tuple[EchoPlan, dict[str, Tensor]]:
        """
        The forward of a micro-batch; that of the plain loss where only the loss is looked at and it is not finite.

        Args:
            run: the forward of the wrapped model for a plan.
            plan: of the micro-batch.

        Returns:
            The plan that was used, and its output.
        """
        output = run(plan)
        if plan.layout is None or not self._checks_loss_only():
            return plan, output
        if self._agreed_finite([output["objective"]]):
            self.nonfinite_in_a_row = self.nonfinite_in_a_row if plan.weightless else 0
            return plan, output
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

    def _watch_the_scaler(self) -> None:
        """
        Stop when the fp16 scaler has skipped every optimizer step since its scale was last looked at.

        Not by `accelerator.optimizer_step_was_skipped`: it is never true for a fused optimizer, the default.
        """
        step, scaler = self.host.state.global_step, self.host.accelerator.scaler
        if scaler is None or (self._scale_seen is not None and step < self._scale_seen[0] + MAX_SKIPPED_IN_A_ROW):
            return
        scale = scaler.get_scale()  # waits for the device, so not in every step
        if self._scale_seen is not None:
            seen_at, before = self._scale_seen
            if scale <= before * scaler.get_backoff_factor() ** (step - seen_at):
                raise NonFiniteLossError(
                    f"The last {step - seen_at} optimizer steps, up to step {step}, were all skipped: their gradients "
                    f"are not finite whatever the scale of fp16 (it is {scale:g} by now). No weight was changed by "
                    f"them. Use bf16=True instead of fp16, or a lower echo_learning_rate, or no echo "
                    f"(echo_p_start=0 and echo_p_end=0)."
                )
        self._scale_seen = (step, scale)

    def _all_finite(self, loss: Tensor) -> bool:
        """Whether loss and gradients are finite on every process; the same answer on all of them."""
        # fp16 scales the loss so high that infinite gradients are normal: the scaler looks at those itself.
        gradients = [] if self.host.accelerator.scaler is not None else map(_local, self._gradients().values())
        # One maximum over all gradients: looking at each would launch hundreds of kernels a step. With FSDP2 a process
        # may hold no row of a small matrix, and nothing has no maximum.
        largest = get_total_norm([gradient for gradient in gradients if gradient.numel()], norm_type=math.inf)
        return self._agreed_finite([loss, largest])

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
        """Gradients of the micro-batches before, with accumulation; else nothing."""
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
