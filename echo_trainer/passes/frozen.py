"""The frozen prefix of a model: what the layers below the first trained one make of a document, computed once.

Where LoRA adapts upper layers only, the layers below them compute the same states of the same tokens in every epoch.
The states of a document are computed in a row of its own, without padding, so they are a function of its tokens alone:
of no batch, no order and no resume. A step begins at the first trained layer with them.

Whether that is the model's own forward is proved on the first batch, in `frozen_proof.py`.

Shapes: B rows, T tokens a row, D documents of the batch, n tokens of one, M of all; d hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .layer_io import form_of, forward_hook, input_hook, input_of, like, planes_first, tokens_first
from .modules import forward_replaced


class FrozenPrefixError(ValueError):
    """The layers below the first trained one cannot be computed once and for all."""


@dataclass(frozen=True)
class Documents:
    """
    The documents of a batch, on the host.

    Attributes:
        keys: of each, what its states depend on: a digest of its tokens.
        start_D, end_D: int64 (D,), their first position and one past their last, of the flattened batch.
    """

    keys: tuple[bytes, ...]
    start_D: Int[Tensor, "D"]
    end_D: Int[Tensor, "D"]

    @property
    def position_M(self) -> Int[Tensor, "M"]:
        """int64 (M,): positions of their tokens in the flattened batch, document after document."""
        length = self.end_D - self.start_D
        before = length.cumsum(0) - length
        return torch.arange(int(length.sum())) + (self.start_D - before).repeat_interleave(length)


class FrozenPrefix:
    """
    States of documents at the first trained layer, and a backbone that begins there.

    Args:
        backbone: the part of the model below its head.
        layers: its decoder layers.
        room: bytes of host memory that the states may take; what does not fit is computed anew each time.

    Attributes:
        start: index of the first layer with a trained parameter.
        n_bytes: bytes kept.
        proved: whether it is known to be the model's own forward.
        full: whether there was no room for a document.
        computed, used: documents whose layers below `start` were run, and that a step began with.

    Raises:
        FrozenPrefixError: the first layer of all is trained, or none.
    """

    def __init__(self, backbone: nn.Module, layers: nn.ModuleList, room: int):
        trained = [i for i, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters())]
        if not trained or trained[0] == 0:
            what = "layer 0 has trained weights" if trained else "no layer has trained weights"
            raise FrozenPrefixError(
                f"`frozen_prefix_cache` keeps what the layers below the first trained one compute, and {what}. Let "
                f"LoRA adapt upper layers only: layers_to_transform=[...] of the LoraConfig, or in a recipe "
                f"`lora_layers: last`; or leave `frozen_prefix_cache` out."
            )
        self.backbone, self.layers, self.room = backbone, layers, room
        self.start = trained[0]
        self.n_bytes = self.computed = self.used = 0
        self.full = False
        self._kept: dict[bytes, Tensor] = {}
        self._form: Any = None
        self._ndim = 3
        self.proved = False
        self._entry: tuple[list[Tensor], Documents, Tensor] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, a forward of the backbone on a batch that was announced (`announced`) begins at `start`."""
        stack = ExitStack()

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if self._entry is None:
                return
            states, documents, input_ids = self._entry
            given = kwargs.get("input_ids", args[0] if args else None)
            if given is not None and given.data_ptr() == input_ids.data_ptr() and given.shape == input_ids.shape:
                self._entry = None
                stack.enter_context(self.entering(states, documents, given.shape))

        handles = [
            self.backbone.register_forward_pre_hook(before, with_kwargs=True),
            self.backbone.register_forward_hook(lambda *_: stack.close(), always_call=True),
        ]
        try:
            yield
        finally:
            stack.close()
            for handle in handles:
                handle.remove()

    @contextmanager
    def announced(
        self,
        documents: Documents,
        inputs: dict[str, Any],
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ) -> Iterator[None]:
        """
        The first forward of the backbone on `input_ids` inside begins at `start`.

        Args:
            documents: of the batch.
            inputs: keyword arguments of the backbone.
            autocast: as the forward of the model that is trained has it.

        Raises:
            FrozenPrefixError: there was none.
        """
        with autocast():
            self._entry = self.states(inputs, documents), documents, inputs["input_ids"]
        self.used += len(documents.keys)
        try:
            yield
            if self._entry is not None:
                raise FrozenPrefixError(
                    "`frozen_prefix_cache` is on, and the model was not run on the `input_ids` of its batch: what "
                    "computes the loss gave it others, or embeddings. Leave `frozen_prefix_cache` out."
                )
        finally:
            self._entry = None

    @torch.no_grad()
    def states(self, inputs: dict[str, Any], documents: Documents) -> list[Float[Tensor, "_ *planes d"]]:
        """
        States (n, d) of each document at layer `start`, on the host: those kept, or computed now.

        Args:
            inputs: keyword arguments of the backbone.
            documents: of the batch.
        """
        found = []
        bounds = zip(documents.keys, documents.start_D.tolist(), documents.end_D.tolist(), strict=True)
        for key, start, end in bounds:
            states = self._kept.get(key)
            if states is None:
                states = self._alone(inputs, start, end)
                size = states.numel() * states.element_size()
                if self.n_bytes + size <= self.room:
                    self._kept[key] = states
                    self.n_bytes += size
                else:
                    self.full = True
            found.append(states)
        return found

    def observe(self, inputs: dict[str, Any]) -> tuple[Float[Tensor, "B T *planes d"], Float[Tensor, "B T d"]]:
        """States at layer `start`, and the final ones, of the model's own forward."""
        seen: list[Tensor] = []
        shape = inputs["input_ids"].shape

        def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self._ndim = input_of(args, kwargs).dim()
            seen.append(tokens_first(input_of(args, kwargs), shape))

        def remember(module: nn.Module, args: tuple, output: Any) -> None:
            self._form = form_of(output)

        with input_hook(self.layers[self.start], keep), forward_hook(self.layers[self.start - 1], remember):
            final = self.backbone(**inputs).last_hidden_state
        return seen[0], final

    def _alone(self, inputs: dict[str, Any], start: int, end: int) -> Float[Tensor, "n *planes d"]:
        """States (n, d) of one document in a row of its own, on the host; the layers from `start` on do not run."""
        row = {"input_ids": inputs["input_ids"].reshape(1, -1)[:, start:end]}
        seen: list[Tensor] = []

        def pass_through(*args: Any, **kwargs: Any) -> Any:
            if not seen:
                seen.append(tokens_first(input_of(args, kwargs), (1, end - start))[0])
            return like(self._form, input_of(args, kwargs))

        with ExitStack() as stack:
            for layer in self.layers[self.start :]:
                stack.enter_context(forward_replaced(layer, pass_through))
            self.backbone(**row, use_cache=False)
        self.computed += 1
        return seen[0].cpu()

    @contextmanager
    def entering(self, states: Sequence[Tensor], documents: Documents, shape: Sequence[int]) -> Iterator[None]:
        """The layers below `start` pass through, the last of them returns `states`; zeros where there is padding."""

        def enter(*args: Any, **kwargs: Any) -> Any:
            given = input_of(args, kwargs)
            known_M = torch.cat(list(states)).to(given.device, non_blocking=True)
            rows, width = shape
            flat = known_M.new_zeros(rows * width, *known_M.shape[1:])
            flat.index_copy_(0, documents.position_M.to(given.device, non_blocking=True), known_M)
            entry = planes_first(flat.view(rows, width, *flat.shape[1:]))
            return like(self._form, entry.view(given.shape) if self._ndim == 2 else entry)

        def pass_through(*args: Any, **kwargs: Any) -> Any:
            return like(self._form, input_of(args, kwargs))

        with ExitStack() as stack:
            for layer in self.layers[: self.start - 1]:
                stack.enter_context(forward_replaced(layer, pass_through))
            stack.enter_context(forward_replaced(self.layers[self.start - 1], enter))
            yield
