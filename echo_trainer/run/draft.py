"""A batch whose routes are drawn and whose echo pass is not laid out yet.

Routes are a pure function of (seed, step, micro-batch, row), so they are drawn in the process that trains, when the
step is known: a data loader looks ahead, and its workers never see the step. How the echo pass is computed is chosen
when a batch of its kind has been proved (`pass_choice.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..method.forms import EchoForm
from ..method.plan import EchoPlan, make_plan
from ..method.routing import RoutingSchedule
from ..method.segments import Segments
from ..passes.full import BATCH, ROWS
from .answers import Answers, answers_of, mixed_inputs, other_inputs
from .ownership import Owned


@dataclass(frozen=True)
class DraftPlan:
    """
    A collated batch whose routes are drawn and whose echo pass is not laid out yet.

    Attributes:
        batch: what the collator returned, on any device.
        answers: what the host knows of it.
        routed_D: bool (D,), r_i of every document.
        probability: p_k.
        positions, lockstep: as for `make_plan`.
        plans: those made so far, by form and number of passes.
    """

    batch: dict[str, Any]
    answers: Answers
    routed_D: np.ndarray
    probability: float
    positions: str
    lockstep: bool
    plans: dict[tuple[EchoForm, int | None], EchoPlan] = field(default_factory=dict, repr=False, compare=False)

    @property
    def segments(self) -> Segments:
        """The answers of the batch."""
        return self.answers.segments

    def plan(self, form: EchoForm, n_parts: int | None = None) -> EchoPlan:
        """
        The plan of the step, its echo pass laid out in `form` (and, over suffixes, in so many passes).

        All rows run where nobody knows what is whose.
        """
        if (form, n_parts) not in self.plans:
            options = {"probability": self.probability, "lockstep": self.lockstep, "n_parts": n_parts}
            self.plans[form, n_parts] = self.plan_of(self.routed_D, form, **options)
        return self.plans[form, n_parts]

    def plan_of(self, routed_D: Sequence[bool] | np.ndarray, form: EchoForm, **options: Any) -> EchoPlan:
        """The plan of the batch with other routes; options as for `make_plan`."""
        owned = self.owned if form.picks_rows else Owned({}, ())
        options |= {"positions": self.positions, "position_ids": self.answers.position_ids}
        if owned is None:
            return make_plan(self.segments, routed_D, form=BATCH, **options)
        options |= {"images": owned.images, "picks": owned.picks if owned.parts else None}
        plan = make_plan(self.segments, routed_D, form=form, **options)
        if plan.weightless and owned.parts:  # one row for the sake of other processes, which may have no image
            return make_plan(self.segments, routed_D, form=BATCH, **(options | {"images": (), "picks": None}))
        return plan

    @property
    def owned(self) -> Owned | None:
        """What each row owns of the inputs that are not text; None where that is not known."""
        return None if self.lockstep and mixed_inputs(self.batch) else self.answers.owned

    @property
    def answered(self) -> bool:
        """Whether some document has an answer that an echo can reach."""
        return bool(len(reachable_documents(self.segments, self.positions)))

    @property
    def length(self) -> int:
        """Tokens of the longest document."""
        return int((self.segments.end_D - self.segments.start_D).max()) if self.segments.n_documents else 0

    @property
    def kind(self) -> str:
        """What a model may treat differently in this batch than in others, in words."""
        rows = self.segments.shape[0]
        mask = self.batch.get("attention_mask")
        if self.segments.n_documents > rows:
            kind = "rows of several documents (packed or padding-free)"
        elif mask is None:
            kind = "rows without padding"
        elif mask.dim() != 2:
            kind = f"rows with an attention mask of {mask.dim()} dimensions"
        else:
            left = bool((self.segments.start_D % self.segments.shape[1]).ne(0).any())
            kind = "rows padded on the left" if left else "padded rows"
        if self.batch.get("position_ids") is not None and mask is not None:
            kind += ", with position ids"
        return f"{kind}, with {', '.join(self.other_inputs)}" if self.other_inputs else kind

    @property
    def other_inputs(self) -> list[str]:
        """Inputs that are not text, such as images."""
        return other_inputs(self.batch)

    def unprovable(self, form: EchoForm) -> str | None:
        """
        Why one batch of this kind proves nothing about the next, None where it does.

        A mask of one's own and inputs that are not text may mean something else in every batch: which token sees
        which, which row an image belongs to, and whether one stands after the first answer.
        """
        if form.runs_suffixes and self.other_inputs:
            return f"which tokens need {', '.join(self.other_inputs)} differs from batch to batch"
        if form.runs_suffixes and self._unusual_places:
            return f"which position a token has is up to position ids of {self.batch['position_ids'].dim()} dimensions"
        if form.picks_rows and self.owned is None:
            what = ", ".join(self.other_inputs) or "position_ids"
            why = "every process must run the same" if self.lockstep else "that is not known"
            return f"a row can be run without the others only with its own part of {what}, and {why}"
        mask = self.batch.get("attention_mask")
        if form.runs_suffixes and mask is not None and mask.dim() != 2:
            return f"which token sees which is up to an attention mask of {mask.dim()} dimensions"
        return None

    @property
    def _unusual_places(self) -> bool:
        """Whether position ids have another form than one number for each token."""
        places = self.batch.get("position_ids")
        return places is not None and places.dim() != 2


def reachable_documents(segments: Segments, positions: str) -> torch.Tensor:
    """Documents in which an echo reaches a position that predicts an answer token, int64, in their order."""
    plan = make_plan(segments, [True] * segments.n_documents, form=ROWS, positions=positions)
    return segments.document_N[plan.reach_E].unique()


def draw(
    batch: dict[str, Any],
    schedule: RoutingSchedule,
    step: int,
    micro_batch: int,
    positions: str = "answer",
    lockstep: bool = False,
) -> DraftPlan:
    """
    Draw which documents of a collated batch are routed.

    Args:
        batch: what the data loader gave.
        schedule: of the run.
        step: optimizer step, from 0.
        micro_batch: index in the step.
        positions, lockstep: as for `make_plan`.
    """
    answers = answers_of(batch)
    return DraftPlan(
        batch=batch,
        answers=answers,
        routed_D=schedule.draw(step, micro_batch, answers.sample_D, answers.number_D),
        probability=schedule.probability(step),
        positions=positions,
        lockstep=lockstep,
    )


def draw_all(batch: dict[str, Any], positions: str = "answer", lockstep: bool = False) -> DraftPlan:
    """A collated batch every document of which is routed; arguments as for `draw`."""
    answers = answers_of(batch)
    routed_D = np.ones(answers.segments.n_documents, dtype=bool)
    return DraftPlan(batch, answers, routed_D, 1.0, positions, lockstep)
