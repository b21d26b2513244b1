"""Deferred collation: the collator that draws the routes, called when the step it belongs to is known.

A data loader looks ahead, gradient accumulation pulls several batches at once and worker processes never see the
step, so an ordinary collator cannot know when its batch will be used. Therefore the training data loader yields
uncollated examples in a `DeferredBatch`, and the trainer calls `EchoCollator` at the moment of use.

A collated batch is a draft first: its routes are drawn, and how its echo pass is computed is chosen when a batch of
its kind has been proved (`pass_choice.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..method.layouts import EchoForm
from ..method.plan import EchoPlan, make_plan
from ..method.routing import RoutingSchedule
from ..method.segments import Segments, find_segments

PLAN_KEY = "echo_plan"
TEXT_INPUTS = {"input_ids", "attention_mask", "position_ids", "labels"}
# Keys with the same information as `position_ids`, for varlen kernels; the suffix pass lays documents out anew.
PADDING_FREE_INPUTS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


class DeferredBatch:
    """The examples of one micro-batch, not collated yet. Opaque, so that no data loader looks inside."""

    def __init__(self, examples: Sequence[dict[str, Any]]):
        self.examples = list(examples)

    def __len__(self) -> int:
        return len(self.examples)


@dataclass(frozen=True)
class DraftPlan:
    """
    A collated batch whose routes are drawn and whose echo pass is not laid out yet.

    Attributes:
        batch: what the collator returned, without this draft.
        examples: what it was made of.
        segments: its answers.
        routed_D: r_i of every document.
        probability: p_k.
        positions, lockstep: as for `make_plan`.
        plans: those made so far, by form and number of passes.
    """

    batch: dict[str, Any]
    examples: Sequence[dict[str, Any]]
    segments: Segments
    routed_D: list[bool]
    probability: float
    positions: str
    lockstep: bool
    plans: dict[tuple[EchoForm, int | None], EchoPlan] = field(default_factory=dict, repr=False, compare=False)

    def plan(self, form: EchoForm, n_parts: int | None = None) -> EchoPlan:
        """The plan of the step, its echo pass laid out in `form` (and, over suffixes, in so many passes)."""
        if (form, n_parts) not in self.plans:
            self.plans[form, n_parts] = self._plan(form, n_parts)
        return self.plans[form, n_parts]

    def _plan(self, form: EchoForm, n_parts: int | None) -> EchoPlan:
        return make_plan(
            self.segments,
            self.routed_D,
            positions=self.positions,
            form=form,
            position_ids=places_of(self.batch),
            probability=self.probability,
            lockstep=self.lockstep,
            n_parts=n_parts,
        )

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
        return sorted(set(self.batch) - TEXT_INPUTS - PADDING_FREE_INPUTS)

    def unprovable(self, form: EchoForm) -> str | None:
        """
        Why one batch of this kind proves nothing about the next, None where it does.

        A mask of one's own and inputs that are not text may mean something else in every batch: which token sees
        which, which row an image belongs to, and whether one stands after the first answer.
        """
        if form is not EchoForm.BATCH and self.other_inputs:
            return f"which tokens need {', '.join(self.other_inputs)} differs from batch to batch"
        places = self.batch.get("position_ids")
        if form is not EchoForm.BATCH and places is not None and places.dim() != 2:
            return f"which position a token has is up to position ids of {places.dim()} dimensions"
        mask = self.batch.get("attention_mask")
        if form is EchoForm.SUFFIX and mask is not None and mask.dim() != 2:
            return f"which token sees which is up to an attention mask of {mask.dim()} dimensions"
        return None


def places_of(batch: dict[str, Any]) -> torch.Tensor | None:
    """Position ids of a batch, (1 or B, T); None where it has none, or some of another form."""
    places = batch.get("position_ids")
    return places if places is not None and places.dim() == 2 else None


def reachable_documents(segments: Segments, positions: str) -> torch.Tensor:
    """Documents in which an echo reaches a position that predicts an answer token, int64, in their order."""
    plan = make_plan(segments, [True] * segments.n_documents, positions=positions)
    return segments.document_F[plan.predict_N[plan.reach_E]].unique()


class EchoCollator:
    """
    Collate a batch with `collator`, draw which of its samples are routed, and add the plan of the echo pass.

    Args:
        collator: collator of the plain batch, such as TRL's. Its output is kept as it is.
        positions: "answer" or "predicting".
        lockstep: give every batch an echo pass, one of no weight where nothing is routed (see `method/silence.py`).
        form: how `__call__` lays the echo pass out. The trainer chooses for every batch anew.

    The routes need `schedule`, which the trainer sets when training begins. Called without a step (evaluation, or by
    hand) it is the collator it wraps.
    """

    def __init__(
        self,
        collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
        positions: str = "answer",
        lockstep: bool = False,
        form: EchoForm = EchoForm.ROWS,
    ):
        self.collator = collator
        self.positions = positions
        self.lockstep = lockstep
        self.form = form
        self.schedule: RoutingSchedule | None = None

    def __call__(
        self, examples: list[dict[str, Any]], step: int | None = None, micro_batch: int = 0
    ) -> dict[str, Any]:
        """
        Collate `examples`; with `step` (optimizer step, from 0) and `micro_batch` (index in the step) add the plan.

        Returns:
            The batch of the wrapped collator, with an [`EchoPlan`] under "echo_plan" if `step` is given.
        """
        if step is None:
            return dict(self.collator(examples))
        draft = self.draft(examples, step, micro_batch)
        return {**draft.batch, PLAN_KEY: draft.plan(self.form)}

    def draft(self, examples: Sequence[dict[str, Any]], step: int, micro_batch: int) -> DraftPlan:
        """Collate examples and draw the routes of their documents."""
        if self.schedule is None:
            raise RuntimeError(
                "EchoCollator was given a step before `schedule` was set; the trainer does so in train()."
            )
        batch = dict(self.collator(examples))
        segments = find_segments(batch, examples)
        return DraftPlan(
            batch=batch,
            examples=examples,
            segments=segments,
            routed_D=[self.schedule.draw(step, micro_batch, *p) for p in sample_of_document(segments, examples)],
            probability=self.schedule.probability(step),
            positions=self.positions,
            lockstep=self.lockstep,
        )


def sample_of_document(segments: Segments, examples: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    """For every document: the sample it belongs to and its number inside the sample (packed examples hold several)."""
    rows, length = segments.shape
    if rows == len(examples) and "seq_lengths" not in examples[0]:
        return [(int(start) // length, 0) for start in segments.start_D]
    places = [
        (row, document)
        for row, example in enumerate(examples)
        for document in range(len(example.get("seq_lengths") or [0]))
    ]
    # Positions that pad a padding-free batch count as documents of their own; they hold no answer.
    return places + [(len(examples), extra) for extra in range(segments.n_documents - len(places))]
