"""Deferred collation: the collator that draws the routes, called when the step it belongs to is known.

A data loader looks ahead, gradient accumulation pulls several batches at once and worker processes never see the
step, so an ordinary collator cannot know when its batch will be used. Therefore the training data loader yields
uncollated examples in a `DeferredBatch`, and the trainer calls `EchoCollator` at the moment of use.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from .plan import EchoPlan, make_plan, starts_at_column_zero
from .routing import RoutingSchedule
from .segments import Segments, find_segments

logger = logging.getLogger(__name__)

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


class EchoCollator:
    """
    Collate a batch with `collator`, draw which of its samples are routed, and add the plan of the echo pass.

    Args:
        collator: collator of the plain batch, such as TRL's. Its output is kept as it is.
        positions: "answer" or "predicting".
        suffix: whether the echo pass is laid out as a suffix pass. A batch for which that would not be exact is laid
            out as a full pass, which is said once.
        strict: raise instead (`echo_pass="suffix"`).
        lockstep: give every batch an echo pass, one of no weight where nothing is routed (see `lockstep.py`).

    The routes need `schedule`, which the trainer sets when training begins. Called without a step (evaluation, or by
    hand) it is the collator it wraps.
    """

    def __init__(
        self,
        collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
        positions: str,
        suffix: bool,
        strict: bool = False,
        lockstep: bool = False,
    ):
        self.collator = collator
        self.positions = positions
        self.suffix = suffix
        self.strict = strict
        self.lockstep = lockstep
        self.fallback: str | None = None
        self.schedule: RoutingSchedule | None = None

    def __call__(
        self, examples: list[dict[str, Any]], step: int | None = None, micro_batch: int = 0
    ) -> dict[str, Any]:
        """
        Collate `examples`; with `step` (optimizer step, from 0) and `micro_batch` (index in the step) add the plan.

        Returns:
            The batch of the wrapped collator, with an [`EchoPlan`] under "echo_plan" if `step` is given.
        """
        batch = dict(self.collator(examples))
        if step is not None:
            batch[PLAN_KEY] = self.plan(batch, examples, step, micro_batch)
        return batch

    def plan(self, batch: dict[str, Any], examples: Sequence[dict[str, Any]], step: int, micro_batch: int) -> EchoPlan:
        """Draw the routes of a collated batch and lay out its echo pass."""
        if self.schedule is None:
            raise RuntimeError(
                "EchoCollator was given a step before `schedule` was set; the trainer does so in train()."
            )
        segments = find_segments(batch, examples)
        routed = [self.schedule.draw(step, micro_batch, *place) for place in sample_of_document(segments, examples)]
        return make_plan(
            segments,
            routed,
            positions=self.positions,
            suffix=self._lay_out_suffix(batch, segments),
            position_ids=batch.get("position_ids"),
            probability=self.schedule.probability(step),
            lockstep=self.lockstep,
        )

    def _lay_out_suffix(self, batch: dict[str, Any], segments: Segments) -> bool:
        if not self.suffix:
            return False
        obstacle = _batch_obstacle(batch, segments)
        if obstacle is None:
            return True
        if self.strict:
            raise ValueError(f"echo_pass='suffix' cannot be exact for a batch: {obstacle}. Use echo_pass='auto'.")
        if self.lockstep:
            raise ValueError(
                f"The echo pass of a batch cannot be a suffix ({obstacle}), and where parameters are sharded every "
                f"process must run the same kind of pass. Set echo_pass='full'."
            )
        if self.fallback is None:
            logger.warning("The echo pass of a batch runs whole sequences: %s. (Said once.)", obstacle)
            self.fallback = obstacle
        return False


def _batch_obstacle(batch: dict[str, Any], segments: Segments) -> str | None:
    """Why a suffix pass of this batch would not be exact, None if it is."""
    extra = set(batch) - TEXT_INPUTS - PADDING_FREE_INPUTS
    if extra:
        return f"it has inputs that are not text: {', '.join(sorted(extra))}"
    mask = batch.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        return f"its attention mask has {mask.dim()} dimensions, so which token sees which is not known"
    if batch.get("position_ids") is None and not starts_at_column_zero(segments):
        return "its rows are padded on the left, without position ids"
    return None


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
