"""`frozen_prefix_cache`: the layers below the first trained one run once for each document of the run.

`passes/frozen.py` has what is kept and the proof that it is exact; here is when it is used, and for which batches.
"""

import hashlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import numpy as np
import psutil
from accelerate.utils import send_to_device

from ..config import router_loss_weight
from ..method.segments import Segments, find_segments
from ..passes.frozen import Documents, FrozenPrefix, FrozenPrefixError
from ..passes.frozen_proof import prove_prefix
from ..passes.layers import backbone, decoder_layers
from ..passes.modules import base_model_of
from .answers import backbone_inputs, other_inputs
from .at_work import AtWork
from .host import Host

logger = logging.getLogger(__name__)

SHARE = 0.5
"""Of the host memory that is free when training begins, what the states may take (of all processes of a machine)."""


def documents_of(batch: dict[str, Any], segments: Segments) -> Documents | None:
    """
    The documents of a collated batch, on the host; None where it holds more than text, or says itself which token
    sees which.

    Raises:
        FrozenPrefixError: the places of tokens are not those that a document has alone.
    """
    mask = batch.get("attention_mask")
    if other_inputs(batch) or (mask is not None and mask.dim() != 2):
        return None
    start_D, end_D = segments.start_D, segments.end_D
    ids_F = batch["input_ids"].numpy().reshape(-1)
    places, width = batch.get("position_ids"), segments.shape[1]
    bounds = list(zip(start_D.tolist(), end_D.tolist(), strict=True))
    if places is None:
        usual = not (start_D % width).any()
    else:
        number_F = np.concatenate([np.arange(end - start) for start, end in bounds])
        at_F = np.concatenate([np.arange(start, end) for start, end in bounds])
        usual = places.shape == batch["input_ids"].shape and bool((places.numpy().reshape(-1)[at_F] == number_F).all())
    if not usual:
        raise FrozenPrefixError(
            "`frozen_prefix_cache` computes each document in a row of its own, from position 0 on, and in this batch "
            "the first token of a document has another position (padding on the left or in between, or position_ids "
            "of your own). Pad on the right and leave `position_ids` to the collator, or leave `frozen_prefix_cache` "
            "out."
        )
    keys = tuple(hashlib.blake2b(ids_F[start:end].tobytes(), digest_size=16).digest() for start, end in bounds)
    return Documents(keys, start_D, end_D)


class PrefixKeeper:
    """
    The frozen prefix of a trainer, while it trains.

    Attributes:
        prefix: None where `frozen_prefix_cache` is off or nobody trains.
    """

    def __init__(self, host: Host):
        self.host = host
        self.prefix: FrozenPrefix | None = None
        self._said = False

    @property
    def wanted(self) -> bool:
        """Whether the option is on."""
        return bool(self.host.args.frozen_prefix_cache)

    def training(self, run: Callable[[], Any]) -> Any:
        """
        Run the Trainer's loop, with the prefix at hand where it is wanted.

        Raises:
            FrozenPrefixError: it cannot work with the model or with an option.
        """
        if not self.wanted:
            return run()
        self._refuse_options()
        model = base_model_of(self.host.model)
        layers = decoder_layers(model, self.host.args.echo_layers)
        local = max(self.host.accelerator.num_processes, 1)
        room = int(psutil.virtual_memory().available * SHARE / local)
        self.prefix = prefix = FrozenPrefix(backbone(model, layers), layers, room)
        self._said = False
        try:
            with prefix.watching():
                return run()
        finally:
            self.prefix = None
            logger.info(
                "frozen_prefix_cache: layers 0 to %d ran %d times for %d documents; %.1f MiB were kept.",
                prefix.start - 1,
                prefix.computed,
                prefix.used,
                prefix.n_bytes / 2**20,
            )
            if prefix.full:
                logger.warning(
                    "frozen_prefix_cache: not all documents fitted into %.1f GiB, half of the memory that was free; "
                    "the lower layers ran again for the others.",
                    room / 2**30,
                )

    def step(self, at_work: AtWork, inputs: dict[str, Any]) -> AbstractContextManager[None]:
        """
        Inside, the plain pass of the micro-batch at work begins at the first trained layer.

        Args:
            at_work: what knows the documents of the micro-batch.
            inputs: of the model, with `labels`.

        Raises:
            FrozenPrefixError: on the first batch, that the prefix is not the model's own forward.
        """
        if self.prefix is None or not at_work.running:  # evaluation
            return nullcontext()
        if names := other_inputs(inputs):
            if not self._said:
                logger.warning(
                    "frozen_prefix_cache: batches with %s run through all layers; only those of text alone begin at "
                    "the first trained one.",
                    ", ".join(names),
                )
                self._said = True
            return nullcontext()
        documents = at_work.documents
        if documents is None:  # a loader of somebody else's; this waits for the device
            batch = cast("dict[str, Any]", send_to_device(dict(inputs), "cpu"))
            documents = documents_of(batch, find_segments(batch))
        if documents is None:
            return nullcontext()
        prefix, given, autocast = self.prefix, backbone_inputs(inputs), self.host.accelerator.autocast
        if not prefix.proved:
            with autocast():
                prove_prefix(prefix, given, documents)
        return prefix.announced(documents, given, autocast)

    def _refuse_options(self) -> None:
        host = self.host
        if host.is_fsdp_enabled or host.is_deepspeed_enabled:
            raise FrozenPrefixError(
                "`frozen_prefix_cache` runs the lower layers when a document first comes, which is another moment on "
                "each process, and FSDP and DeepSpeed gather weights on all of them at once. Use DDP, or leave "
                "`frozen_prefix_cache` out."
            )
        if router_loss_weight(host.args, host.model.config) is not None:
            raise FrozenPrefixError(
                "`frozen_prefix_cache` does not run the routers of the lower layers, and the load-balancing loss of "
                "this mixture of experts is made of what all routers say. Set router_aux_loss_coef=0, or leave "
                "`frozen_prefix_cache` out."
            )
        if host.args.torch_compile:
            raise FrozenPrefixError(
                "`torch_compile=True` compiles the forward of layers that `frozen_prefix_cache` replaces in every "
                "step. Leave one of them out."
            )
