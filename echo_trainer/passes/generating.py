"""Write with the echo: each prompt is read once, which gives its z; every token after it gets the same delta.

Shapes: B rows of a batch, P tokens of the longest prompt, S source layers, o_m output size of module m, d hidden size.

Prompts are padded on the left, so the boundary of every row is the last column of the first forward. z is a function
of the prompt alone, so delta stays what it was: with a cache, where each later forward reads one token a row, what is
written is what a computation of the whole sequence anew would give.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..method.sites import EchoSite, site_key
from .layer_io import first_plane, forward_hook, hidden_of, input_hook, tokens_first
from .setup import EchoSetup


@contextmanager
def writing_with_echo(setup: EchoSetup, positions: str) -> Iterator[None]:
    """
    One call of the model's `generate` inside writes what the echo-augmented model would.

    Args:
        setup: the model, in evaluation mode, and its echo parts.
        positions: "answer", or "predicting" (prompts are then read twice: their last token gets the echo, too).

    Raises:
        ValueError: a prompt is not padded on the left, or a module returns something else than a row for each token.
    """
    writer = _Writer(setup, predicting=positions == "predicting")
    layers = setup.layers
    with ExitStack() as stack:
        stack.enter_context(input_hook(setup.backbone, writer.begin))
        for index in setup.source_layers:
            stack.enter_context(forward_hook(layers[index], writer.keep(index)))
        stack.enter_context(forward_hook(setup.backbone, writer.end))
        for site in setup.sites:
            stack.enter_context(forward_hook(site.module, writer.add(site)))
        yield


class _Writer:
    """Hooks of one generation: what is read, and what is added."""

    def __init__(self, setup: EchoSetup, predicting: bool):
        self.setup, self.predicting = setup, predicting
        self.states: dict[int, Tensor] = {}
        self.delta: dict[str, Tensor] | None = None  # delta_m (B, o_m) by `site_key`, once the prompts are read
        self.shape = (0, 0)
        self.width = self.columns = 0  # P; columns of the sequence that were read so far
        self.first = 0  # column of the forward at work where the echo begins
        self.reading = False  # the prompts, for nothing but their z

    def begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """A forward begins; the first one reads the prompts."""
        if self.reading:
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        ids = kwargs["inputs_embeds"] if ids is None else ids
        self.shape = ids.shape[0], ids.shape[1]
        if not self.columns:
            self._begin_with_prompts(module, args, kwargs)
        again = self.shape[1] > self.columns  # without a cache: the whole sequence
        start = 0 if again else self.columns
        self.columns = start + self.shape[1]
        self.first = max(0, self.width - int(self.predicting) - start)

    def _begin_with_prompts(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.width = self.shape[1]
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask[:, -1].all()):
            raise ValueError(
                "The prompts are not padded on the left, so their last tokens, from which the echo is taken, are not "
                "in the last column. Tokenise them with padding_side='left'."
            )
        if self.predicting:  # z must be there before the boundary is read with it
            alone = {k: v for k, v in kwargs.items() if k in ("input_ids", "attention_mask", "position_ids")}
            self.reading = True
            try:
                module(*args[:1], **alone, use_cache=False)
            finally:
                self.reading = False
            self._take_echo()

    def keep(self, index: int) -> Callable:
        """Hook of a source layer."""

        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if self.delta is None:
                states = tokens_first(hidden_of(output), self.shape)[:, -1]
                self.states[index] = first_plane(states)

        return hook

    def end(self, module: nn.Module, args: tuple, output: Any) -> None:
        """A forward has ended."""
        if not self.reading and self.delta is None:
            self._take_echo()

    def add(self, site: EchoSite) -> Callable:
        """Hook of a target module."""
        key = site_key(site)

        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            if self.reading or self.delta is None:
                return None
            rows, length = self.shape
            if output.numel() != rows * length * output.shape[-1]:
                raise ValueError(
                    f"The LoRA module {site.name!r} of layer {site.layer} returned {tuple(output.shape)} for {rows} "
                    f"rows of {length} tokens, so an echo cannot be added token by token while writing."
                )
            by_row = output.reshape(rows, length, -1).clone()
            by_row[:, self.first :] += self.delta[key].to(output.dtype)[:, None]
            return by_row.view_as(output)

        return hook

    def _take_echo(self) -> None:
        device = next(self.setup.networks.parameters()).device
        states_SBd = torch.stack([self.states[index].to(device) for index in self.setup.source_layers])
        self.delta, _ = self.setup.networks(states_SBd)
        self.states = {}
