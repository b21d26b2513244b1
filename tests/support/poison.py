"""Make the echo of one micro-batch of a run not finite, whenever that micro-batch is run."""

from functools import partial

import torch


def poison_a_micro_batch(trainer, number: int, step: int = 1, backward: bool = False) -> None:
    """Micro-batch `number` of optimizer step `step`: its echo is NaN, or only its gradients are infinite."""
    take, compute_loss, at_work = trainer.get_batch_samples, trainer.compute_loss, []

    def get_batch_samples(*args):
        batches, n_items = take(*args)
        now = trainer.state.global_step == step
        trainer.compute_loss = partial(noting, batches[number]["input_ids"].cpu() if now else None)
        return batches, n_items

    def noting(poisoned, model, inputs, *args, **kwargs):
        at_work[:] = [True] if poisoned is not None and torch.equal(poisoned, inputs["input_ids"].cpu()) else []
        return compute_loss(model, inputs, *args, **kwargs)

    def hook(module, args, output):
        delta, gate = output
        if at_work and backward and delta.requires_grad:
            delta.register_hook(lambda gradient: gradient * float("inf"))
        return (delta + float("nan") if at_work and not backward else delta), gate

    trainer.get_batch_samples = get_batch_samples
    next(iter(trainer.echo_networks.networks.values())).register_forward_hook(hook)
