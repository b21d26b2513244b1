"""Collation at the moment of use: the trainer's side of the deferred collation that `collator.py` explains."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .collator import DeferredBatch
from .routing import RoutingSchedule


class DeferredCollationMixin:
    """Data loading for `EchoSFTTrainer`; relies on `self.echo` (None with the echo off)."""

    echo: Any = None

    def get_train_dataloader(self):
        """The training data loader; with the echo on it yields uncollated examples (see `collator.py`)."""
        if self.echo is None:
            return super().get_train_dataloader()
        with self._uncollated():
            return super().get_train_dataloader()

    @contextmanager
    def _uncollated(self) -> Iterator[None]:
        collator, options = self.data_collator, self.accelerator.dataloader_config
        self.data_collator, dispatch = DeferredBatch, options.dispatch_batches
        if not dispatch:  # left out, accelerate would cut the batches of a stream up, and they are not tensors yet
            options.dispatch_batches = False
        try:
            yield
        finally:
            self.data_collator, options.dispatch_batches = collator, dispatch

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step, collated now, when the step is known."""
        if self.echo is not None:
            epoch_iterator = self._collate(epoch_iterator)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _collate(self, batches: Iterator[DeferredBatch]) -> Iterator[dict[str, Any]]:
        args = self.args
        self.data_collator.schedule = RoutingSchedule(
            seed=args.resolved_echo_seed,
            p_start=args.echo_p_start,
            p_end=args.echo_p_end,
            total_steps=self.state.max_steps,
            accumulation=args.gradient_accumulation_steps,
            world_size=args.world_size,
            rank=args.process_index,
            batch_size=self._train_batch_size,
        )
        for micro_batch, batch in enumerate(batches):
            yield self.data_collator(batch.examples, step=self.state.global_step, micro_batch=micro_batch)
