"""Around the training loop: nothing is left of an earlier run, and options that were set since are honoured."""

from collections.abc import Callable
from typing import Any

from ..passes.modules import base_model_of
from .building import set_up_echo
from .host import Host
from .validation import check_arguments


def train_with_echo(host: Host, run: Callable[[], Any]) -> Any:
    """
    Train with the options, the model and the data that a trainer has now.

    Args:
        host: the trainer.
        run: the Trainer's loop.

    Raises:
        ValueError: they cannot work together.
        EchoNotTrainedError: what was replaced in the trainer keeps the echo out.
    """
    host.checkpoints.weights_of_step = None
    host.args.check()
    if not host.args.echo_enabled:
        host.echo = host.pass_choice = None
        return run()
    check_arguments(host.model, None, host.compute_loss_func)
    if host.model_init is not None:  # a new model, or the same one as it was
        host.echo = None
    set_up_echo(host)
    host.rows.compare_with_inference(base_model_of(host.model))
    for part in (host.echo_metrics, host.guard, host.probation, host.first_step):
        part.begin()
    host.add_callback(host.first_step)
    try:
        with host.attachment.training():
            return run()
    finally:
        host.remove_callback(host.first_step)
