"""`EchoCollator`: collate a batch and note where its answers are; with a step also draw its routes and plan it.

In training it runs in the workers of the data loader, without a step: what it adds belongs to the batch alone. The
trainer draws the routes and plans when the step is known (`batches.py`).
"""

from collections.abc import Callable, Sequence
from typing import Any

from ..method.forms import EchoForm
from ..method.routing import RoutingSchedule
from ..passes.full import ROWS
from .answers import PLAN_KEY, EchoBatch, find_answers, mixed_inputs
from .draft import DraftPlan, draw, draw_all
from .frozen_prefix import documents_of
from .ownership import Ownership, copy_of


class EchoCollator:
    """
    Collate a batch with `collator` and note where its answers are; add the plan of an echo pass where a step is given.

    Args:
        collator: collator of the plain batch, such as TRL's. Its output is kept as it is.
        positions: "answer" or "predicting".
        lockstep: give every batch an echo pass, one of no weight where nothing is routed (see `method/silence.py`).
        form: how the echo pass is laid out. The trainer, which plans by itself, chooses for every batch anew.
        documents: also note the documents of each batch, for `frozen_prefix_cache`.

    The routes need `schedule`, to be set before a step is given.
    """

    def __init__(
        self,
        collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
        positions: str = "answer",
        lockstep: bool = False,
        form: EchoForm = ROWS,
        documents: bool = False,
    ):
        self.collator = collator
        self.positions = positions
        self.lockstep = lockstep
        self.form = form
        self.documents = documents
        self.ownership = Ownership(collator)
        self.schedule: RoutingSchedule | None = None

    def learn(self, rows: Sequence[dict[str, Any]]) -> None:
        """Learn from the first rows of the training set which part of an input belongs to which row (images)."""
        if not self.lockstep:  # else nobody asks
            self.ownership.learn(rows, mixed_inputs)

    def __call__(self, examples: Sequence[dict[str, Any]], step: int | None = None, micro_batch: int = 0) -> EchoBatch:
        """
        Collate `examples`; with `step` (optimizer step, from 0) and `micro_batch` (index in the step) add the plan.

        Returns:
            The batch of the wrapped collator, with an [`EchoPlan`] under "echo_plan" if `step` is given.

        Raises:
            ValueError: the batch has no `labels`.
            RuntimeError: a step was given, and `schedule` is not set.
        """
        batch = EchoBatch(self.collator([copy_of(example) for example in examples]))  # TRL's changes what it is given
        batch.answers = find_answers(batch, examples, None if self.lockstep else self.ownership)
        if self.documents:
            batch.documents = documents_of(batch, batch.answers.segments)
        if step is not None:
            batch[PLAN_KEY] = self._draft(batch, step, micro_batch).plan(self.form)
        return batch

    def draft(self, examples: Sequence[dict[str, Any]], step: int, micro_batch: int) -> DraftPlan:
        """Collate examples and draw the routes of their documents; see `__call__`."""
        return self._draft(self(examples), step, micro_batch)

    def draft_with_all(self, examples: Sequence[dict[str, Any]]) -> DraftPlan:
        """Collate examples, every document of which is routed."""
        return draw_all(self(examples), self.positions, self.lockstep)

    def _draft(self, batch: EchoBatch, step: int, micro_batch: int) -> DraftPlan:
        if self.schedule is None:
            raise RuntimeError(
                "EchoCollator was given a step before `schedule` was set: set it to a RoutingSchedule of the run."
            )
        return draw(batch, self.schedule, step, micro_batch, self.positions, self.lockstep)
