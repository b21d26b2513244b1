"""When the echo networks are part of the model: while it is wrapped and trained, and at no other time.

An engine (DDP, FSDP2, DeepSpeed) trains the parameters of the module that it wraps, so from just before it wraps the
model until training ends the networks hang at the model's root. Whoever reads the model meanwhile is shown it without
them: callbacks, evaluation, saving. To take a child off a module and to put it back is a change of one dictionary;
engines and optimizers hold the parameters themselves and do not notice.

A context manager each, so that an exception or an interrupt leaves the plain model behind.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..passes.step import attach_networks, detach_networks, has_networks, install_echo_forward, remove_echo_forward
from .host import Host
from .optimizer import take_in


class Attachment:
    """Puts the echo networks of a trainer on its model, and takes them off."""

    def __init__(self, host: Host):
        self.host = host
        # of a run: the model that has the networks, also while they are hidden
        self._model: nn.Module | None = None
        self._networks: nn.Module | None = None

    @contextmanager
    def training(self) -> Iterator[None]:
        """Training runs inside; afterwards the model is the plain adapted model again."""
        handler = self.host.callback_handler
        call = handler.call_event

        def call_without_networks(*args: Any, **kwargs: Any) -> Any:
            with self.hidden():
                return call(*args, **kwargs)

        handler.call_event = call_without_networks
        try:
            yield
        finally:
            del handler.call_event
            self.take_off()

    def put_on(self) -> None:
        """Model and optimizer are about to be wrapped: networks and step are a part of them."""
        host, echo, model = self.host, self.host.echo, self.host.model
        if echo is None:
            return
        self._model, self._networks = model, echo.networks
        install_echo_forward(model, echo, host.loss_terms)
        attach_networks(model, echo.networks)
        if host.optimizer is not None:
            networks = list(echo.networks.parameters())
            take_in(host.optimizer, host.lr_scheduler, networks, host.args.echo_learning_rate)

    def take_off(self) -> None:
        """Make the model the plain adapted model again."""
        if self._model is not None:
            detach_networks(self._model)
            remove_echo_forward(self._model)
            self._model = self._networks = None

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Who reads the model inside sees the plain adapted model."""
        model, networks = self._model, self._networks
        if model is None or networks is None or not has_networks(model):
            yield
            return
        detach_networks(model)
        try:
            yield
        finally:
            if self._model is model:  # training goes on
                attach_networks(model, networks)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The networks are part of the model inside, whatever they are outside."""
        echo, model = self.host.echo, self.host.model
        if echo is None or has_networks(model):
            yield
            return
        attach_networks(model, echo.networks)
        try:
            yield
        finally:
            detach_networks(model)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """The model understands the keywords of the echo inside (see `install_echo_forward`), trained or not."""
        echo, model = self.host.echo, self.host.model
        if echo is None or self._model is not None:
            yield
            return
        install_echo_forward(model, echo, self.host.loss_terms)
        try:
            yield
        finally:
            remove_echo_forward(model)

    def evaluating(self) -> Any:
        """
        The model is evaluated inside, as the plain adapted model.

        An engine that shards does so with the first module it is given, be that for evaluation: there the networks
        stay, or are put on, since what is attached later would not be sharded.
        """
        shards = self.host.is_fsdp_enabled or self.host.is_deepspeed_enabled
        return self.attached() if shards else self.hidden()
