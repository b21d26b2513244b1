"""The batches of a run: collated where they are loaded, their routes drawn and planned when their step is known."""

from collections.abc import Callable, Iterator
from typing import Any

from datasets import Dataset

from ..method.forms import EchoForm
from ..method.routing import RoutingSchedule
from ..passes.memory import explain_out_of_memory
from ..passes.proof import ProofResult
from .answers import with_plan
from .collate import EchoCollator
from .draft import DraftPlan, draw
from .host import Host
from .proof_rows import no_trace, proof_inputs

FIRST_ROWS = 16
"""Rows of the training set that are looked at before it is loaded."""


class Batches:
    """The batches of a run; with the echo off those of the Trainer."""

    def __init__(self, host: Host):
        self.host = host

    def loader(self, make: Callable[[], Any]) -> Any:
        """
        The training data loader. With the echo on its batches, the same dicts, know where their answers are.

        Args:
            make: makes the Trainer's loader, with the collator that the trainer has at that moment.
        """
        host, collator = self.host, self.host.data_collator
        if host.pass_choice is None and not host.prefix.wanted:
            return make()
        lockstep = host.pass_choice is not None and host.pass_choice.one_form
        host.data_collator = EchoCollator(collator, lockstep=lockstep, documents=host.prefix.wanted)
        # The batches of a stream are asked, each for itself.
        if host.pass_choice is not None and isinstance(host.train_dataset, Dataset):
            rows = range(min(FIRST_ROWS, len(host.train_dataset)))
            host.data_collator.learn([host.train_dataset[row] for row in rows])
        try:
            # Left to itself, accelerate would have one process collate for all, and cut its batches up.
            with host.whole_batches():
                return make()
        finally:
            host.data_collator = collator

    def of_a_step(self, take: Callable[..., tuple[list, Any]], batches: Iterator, n_batches: int, device: Any) -> Any:
        """
        The micro-batches of one optimizer step, planned now, when the step is known.

        Args:
            take: the Trainer's `get_batch_samples`.
            batches, n_batches, device: its arguments.
        """
        host = self.host
        if host.pass_choice is not None:
            host.probation.look()
        taken, n_items = take(batches, n_batches, device)
        if host.pass_choice is None:
            return taken, n_items
        schedule, step = self.schedule(), host.state.global_step
        options = {"positions": host.args.echo_positions, "lockstep": host.pass_choice.one_form}
        drafts = [draw(batch, schedule, step, number, **options) for number, batch in enumerate(taken)]
        host.pass_choice.settle(drafts, self.compare_passes, step)
        plans = host.pass_choice.plans(drafts)
        return [with_plan(draft.batch, plan) for draft, plan in zip(drafts, plans, strict=True)], n_items

    def compare_passes(self, draft: DraftPlan, form: EchoForm) -> ProofResult:
        """Compare the passes on rows of a batch, as training would run them."""
        host = self.host
        with no_trace(host.model_wrapped), host.compute_loss_context_manager():
            inputs, task = proof_inputs(draft, form, host.data_collator, host.args.device)
            with explain_out_of_memory(inputs, task.plans[0], "comparison of the two passes"):
                return host.model_wrapped(**inputs, echo_proof=task)

    def schedule(self) -> RoutingSchedule:
        """How the routes of the run are drawn; before it has begun, as far as that is known."""
        args, state = self.host.args, self.host.state
        stopped = self.host.probation.stopped
        return RoutingSchedule(
            seed=args.resolved_echo_seed,
            p_start=0.0 if stopped else args.echo_p_start,
            p_end=0.0 if stopped else args.echo_p_end,
            total_steps=state.max_steps or max(args.max_steps, 2),
            accumulation=args.gradient_accumulation_steps,
            world_size=args.world_size,
            rank=args.process_index,
            batch_size=state.train_batch_size or args.train_batch_size,
        )
