"""What the trainer knows at the end of its first optimizer step: the echo took part, and every part of it is trained.

A script may replace what a trainer is made of: its loss, its loader, its optimizer. Whether the echo came through is
seen here, before the first step changes a weight, instead of being claimed on the card of a plain adapter.
"""

import logging
import math
from typing import Any

from torch.nn import Parameter
from transformers import TrainerCallback

from ..method.plan import EchoPlan
from .host import Host
from .optimizer import unknown_to
from .validation import FORMATS, OFF

logger = logging.getLogger(__name__)

ROWS = 64
"""Rows of a process after which the run stops, where no answer of any process has come with a prompt."""


class EchoNotTrainedError(RuntimeError):
    """The first optimizer step went by without the echo, or without a part of it."""


class FirstStep(TrainerCallback):
    """
    Stops a run whose first optimizer step trains no echo.

    Attributes:
        plans: micro-batches since training began that were given a plan.
        used: losses that were computed by one.
    """

    def __init__(self, host: Host):
        self.host = host
        self.begin()

    def begin(self) -> None:
        """A run begins, or goes on from a checkpoint."""
        self.plans, self.used, self._steps = 0, 0, 0
        self._answers, self._echoes = 0, 0

    def count(self, plan: EchoPlan) -> None:
        """The loss of a micro-batch was computed by its plan."""
        self.used += 1
        self._answers += plan.n_samples
        self._echoes += plan.n_samples - plan.n_unroutable

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The gradients of an optimizer step are there; raises what `check` and `check_answers` raise."""
        self._steps += 1
        if self._steps == 1:
            with self.host.agreement.together():
                self.check()
        if self._steps == math.ceil(ROWS / (state.train_batch_size * args.gradient_accumulation_steps)):
            self.check_answers()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Say so where a run that ended before it could be stopped had no echo."""
        if self._steps and not self.host.agreement.any(bool(self._echoes)):
            logger.warning("No answer of this run followed a prompt, so it was trained without an echo. %s", FORMATS)

    def check_answers(self) -> None:
        """
        Look whether any answer so far came with a prompt, on any process. Every process must call it.

        Raises:
            ValueError: none did.
        """
        if not self.host.agreement.any(bool(self._echoes)):
            answers = sum(self.host.agreement.gather(self._answers))
            raise ValueError(
                f"None of the first {answers} answers follows a prompt, so nothing was trained with an echo. {FORMATS}"
            )

    def check(self) -> None:
        """
        Look at the micro-batches since training began, at gradients and optimizer.

        Raises:
            EchoNotTrainedError: no plan was made or used, or parameters of the echo networks are not trained.
        """
        if not self.plans:
            raise EchoNotTrainedError(
                f"The first optimizer step had no plan for an echo: {self._owner('get_batch_samples')} took the "
                f"batches without calling that of EchoSFTTrainer, which plans them. Call "
                f"super().get_batch_samples(...) and change what it returns, {OFF}."
            )
        if self.used < self.plans:
            raise EchoNotTrainedError(
                f"{self.plans - self.used} of {self.plans} micro-batches of the first optimizer step were computed "
                f"without an echo: {self._replaced()} did not call that of EchoSFTTrainer, so a plain adapter would "
                f"be trained. Call that of super() and change what it returns, {OFF}."
            )
        if self.host.echo is None or self.host.is_deepspeed_enabled:  # whose engine holds gradients in pieces
            return
        networks = dict(self.host.echo.networks.named_parameters())
        without = [name for name, parameter in networks.items() if parameter.grad is None]
        if without:
            raise EchoNotTrainedError(
                f"{_some(without, networks)} got no gradient in the first optimizer step. What "
                f"{self._owner('compute_loss')} returns must still depend on the loss of EchoSFTTrainer, and the "
                f"optimizer ({self._optimizer}) must not take gradients away during the backward pass, {OFF}."
            )
        left_out = {id(p) for p in unknown_to(self.host.optimizer, list(networks.values()))}
        if left_out:
            names = [name for name, parameter in networks.items() if id(parameter) in left_out]
            raise EchoNotTrainedError(
                f"{_some(names, networks)} are in no parameter group of the optimizer ({self._optimizer}), which was "
                f"replaced after training began. Give it to the trainer with `optimizers=(optimizer, None)`, return "
                f"it from `create_optimizer`, or add trainer.echo_networks.parameters() to it, {OFF}."
            )

    def _owner(self, method: str) -> str:
        """The function that the trainer runs as `method`, in words."""
        function = getattr(self.host, method)
        return f"`{getattr(function, '__qualname__', f'{type(self.host).__name__}.{method}')}`"

    def _replaced(self) -> str:
        """The method of a subclass that takes the place of ours, in words."""
        ours = [each for each in type(self.host).__mro__ if each.__module__.startswith(__name__.partition(".")[0])]
        methods = ("compute_loss", "training_step")
        own = [name for name in methods if getattr(type(self.host), name) is not getattr(ours[0], name)]
        return self._owner((own or methods)[0])

    @property
    def _optimizer(self) -> str:
        return type(getattr(self.host.optimizer, "optimizer", self.host.optimizer)).__name__


def _some(names: list[str], all_of_them: dict[str, Parameter]) -> str:
    return f"{len(names)} of {len(all_of_them)} parameters of the echo networks, such as {names[0]!r},"
