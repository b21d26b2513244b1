"""Collation at the moment of use: the trainer's side of the deferred collation that `collate.py` explains."""

from collections.abc import Callable, Iterator
from typing import Any

from ..method.layouts import EchoForm
from ..method.routing import RoutingSchedule
from ..passes.memory import explain_out_of_memory
from ..passes.proof import ProofResult
from .collate import PLAN_KEY, DeferredBatch, DraftPlan
from .host import Host
from .proof_rows import no_trace, proof_inputs


class Batches:
    """The batches of a run; with the echo off those of the Trainer."""

    def __init__(self, host: Host):
        self.host = host

    def loader(self, make: Callable[[], Any]) -> Any:
        """
        The training data loader; with the echo on it yields uncollated examples.

        Args:
            make: makes the Trainer's loader, with the collator that the trainer has at that moment.
        """
        if self.host.echo is None:
            return make()
        collator, self.host.data_collator = self.host.data_collator, DeferredBatch
        try:
            # Left to itself, accelerate would cut the batches of a stream up, and they are not tensors yet.
            with self.host.whole_batches():
                return make()
        finally:
            self.host.data_collator = collator

    def of_a_step(self, take: Callable[..., tuple[list, Any]], batches: Iterator, n_batches: int, device: Any) -> Any:
        """
        The micro-batches of one optimizer step, collated now, when the step is known, and planned.

        Args:
            take: the Trainer's `get_batch_samples`.
            batches, n_batches, device: its arguments.
        """
        host = self.host
        if host.echo is None:
            return take(batches, n_batches, device)
        taken, n_items = take(self._drafts(batches), n_batches, device)
        drafts = [batch[PLAN_KEY] for batch in taken]
        host.pass_choice.settle(drafts, self.compare_passes, host.state.global_step)
        for batch, plan in zip(taken, host.pass_choice.plans(drafts), strict=True):
            batch[PLAN_KEY] = plan
        return taken, n_items

    def compare_passes(self, draft: DraftPlan, form: EchoForm) -> ProofResult:
        """Compare the passes on rows of a batch, as training would run them."""
        host = self.host
        with no_trace(host.model_wrapped), host.compute_loss_context_manager():
            inputs, task = proof_inputs(draft, form, host.data_collator.collator, host.args.device)
            with explain_out_of_memory(inputs, task.plans[0], "comparison of the two passes"):
                return host.model_wrapped(**inputs, echo_proof=task)

    def _drafts(self, batches: Iterator[DeferredBatch]) -> Iterator[dict[str, Any]]:
        args, state = self.host.args, self.host.state
        self.host.data_collator.schedule = RoutingSchedule(
            seed=args.resolved_echo_seed,
            p_start=args.echo_p_start,
            p_end=args.echo_p_end,
            total_steps=state.max_steps,
            accumulation=args.gradient_accumulation_steps,
            world_size=args.world_size,
            rank=args.process_index,
            batch_size=state.train_batch_size,
        )
        for micro_batch, batch in enumerate(batches):
            draft = self.host.data_collator.draft(batch.examples, state.global_step, micro_batch)
            yield {**draft.batch, PLAN_KEY: draft}
