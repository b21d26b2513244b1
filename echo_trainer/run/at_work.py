"""The plan of the micro-batch at work, beside its inputs instead of among them.

What `compute_loss` is given, the caller's own as well, are the inputs of `SFTTrainer`: each a tensor that can be
moved, measured and given to the model.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..method.plan import EchoPlan
from ..method.segments import IGNORE_INDEX
from ..passes.frozen import Documents
from .answers import PLAN_KEY


def unlike_planned(labels: Tensor, plan: EchoPlan) -> Tensor:
    """
    Whether labels are others than those a plan was made of; nobody waits for the answer.

    Args:
        labels: (B, T).
        plan: on their device.

    Returns:
        A number: NaN where they are, else zero.
    """
    found = labels[:, 1:].ne(IGNORE_INDEX).sum() == len(plan.labels_N)
    same = labels.reshape(-1)[plan.predict_N + 1] == plan.labels_N
    return torch.where(found & same.all(), 0.0, math.nan)


class AtWork:
    """
    Holds a plan while the loss of its micro-batch is computed.

    Attributes:
        running: whether a micro-batch is at work.
        documents: of the one at work, where they are known (`EchoBatch.documents`).
    """

    def __init__(self) -> None:
        self._plan: EchoPlan | None = None
        self._shape: torch.Size | None = None
        self.running = False
        self.documents: Documents | None = None

    def step(self, run: Callable[[dict[str, Any]], Tensor], inputs: dict[str, Any]) -> Tensor:
        """
        One micro-batch, forward and backward.

        Args:
            run: takes the inputs without their plan.
            inputs: with their plan, if they have one.
        """
        self.documents = getattr(inputs, "documents", None)
        inputs = dict(inputs)
        self._plan, self._shape = inputs.pop(PLAN_KEY, None), inputs["input_ids"].shape
        self.running = True
        try:
            return run(inputs)
        finally:
            self.running, self._plan, self.documents = False, None, None

    @property
    def plan(self) -> EchoPlan | None:
        """The plan of the micro-batch at work, on the host; None outside of a training step."""
        return self._plan

    def plan_for(self, inputs: dict[str, Any]) -> EchoPlan | None:
        """
        The plan of the inputs that `compute_loss` was given; None for those of an evaluation.

        Raises:
            ValueError: they are not those that were planned.
        """
        given = inputs.pop(PLAN_KEY, None)  # where the step is somebody else's
        if given is not None or self._plan is None:
            return given
        if "input_ids" not in inputs:
            raise ValueError(
                f"compute_loss was given {sorted(inputs)} and no `input_ids`, which both passes of the echo run on. "
                f"Give the inputs of training_step on, or switch the echo off with echo_p_start=0 and echo_p_end=0."
            )
        if inputs["input_ids"].shape != self._shape:
            raise ValueError(
                f"compute_loss was given `input_ids` of shape {tuple(inputs['input_ids'].shape)}, and the echo of "
                f"this micro-batch was planned for {tuple(self._shape or ())}. Give the inputs of training_step on "
                f"with their rows and columns as they are, and change batches in the data collator instead."
            )
        return self._plan
