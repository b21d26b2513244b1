"""Collation at the moment of use: the trainer's side of the deferred collation that `collator.py` explains."""

from collections.abc import Iterator
from typing import Any

from ..method.layouts import EchoForm
from ..method.routing import RoutingSchedule
from ..passes.memory import explain_out_of_memory
from ..passes.proof import ProofResult
from .collate import PLAN_KEY, DeferredBatch, DraftPlan
from .pass_choice import PassChoice
from .proof_rows import no_trace, proof_inputs


class DeferredCollationMixin:
    """Data loading for `EchoSFTTrainer`; relies on `self.echo` and `self.pass_choice` (None with the echo off)."""

    echo: Any = None
    pass_choice: PassChoice | None = None

    def get_train_dataloader(self):
        """The training data loader; with the echo on it yields uncollated examples (see `collator.py`)."""
        if self.echo is None:
            return super().get_train_dataloader()
        collator, self.data_collator = self.data_collator, DeferredBatch
        try:
            # Left to itself, accelerate would cut the batches of a stream up, and they are not tensors yet.
            with self.whole_batches():
                return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step, collated now, when the step is known, and planned."""
        if self.echo is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        batches, n_items = super().get_batch_samples(self._drafts(epoch_iterator), num_batches, device)
        drafts = [batch[PLAN_KEY] for batch in batches]
        self.pass_choice.settle(drafts, self.compare_passes, self.state.global_step)
        for batch, draft in zip(batches, drafts, strict=True):
            batch[PLAN_KEY] = draft.plan(self.pass_choice.form(draft))
        return batches, n_items

    def _drafts(self, batches: Iterator[DeferredBatch]) -> Iterator[dict[str, Any]]:
        args = self.args
        self.data_collator.schedule = RoutingSchedule(
            seed=args.resolved_echo_seed,
            p_start=args.echo_p_start,
            p_end=args.echo_p_end,
            total_steps=self.state.max_steps,
            accumulation=args.gradient_accumulation_steps,
            world_size=args.world_size,
            rank=args.process_index,
            batch_size=self.state.train_batch_size,
        )
        for micro_batch, batch in enumerate(batches):
            draft = self.data_collator.draft(batch.examples, self.state.global_step, micro_batch)
            yield {**draft.batch, PLAN_KEY: draft}

    def compare_passes(self, draft: DraftPlan, form: EchoForm) -> ProofResult:
        """Compare the passes on rows of a batch, as training would run them."""
        model = self.model_wrapped
        with no_trace(model), self.compute_loss_context_manager():
            inputs, task = proof_inputs(draft, form, self.data_collator.collator, self.args.device)
            with explain_out_of_memory(inputs, task.plans[0], "comparison of the two passes"):
                return model(**inputs, echo_proof=task)
