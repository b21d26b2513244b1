"""Whether a pass over suffixes keeps what it computes for backward, or computes it again then (`echo_memory`).

Decided once, from the model and the options: a run may not depend on which batches it has seen before it was resumed.
"""

import logging
from typing import Any

import torch

from ..compat.checkpointing import require_replay
from ..method.costs import ModelShape
from ..passes.setup import EchoSetup

logger = logging.getLogger(__name__)

SMALL = 64 * 2**20
"""Bytes that are always kept."""
OF_THE_WEIGHTS = 1 / 16
"""Share of the weights' bytes that is kept without a question."""
OF_PLAIN = 0.10
"""Share of what plain LoRA keeps for backward, likewise."""


def computes_again(wanted: str, echo: EchoSetup, model: ModelShape, tokens: int, engine_gathers: bool = False) -> bool:
    """
    Whether what the echo pass computes is computed again in backward.

    Args:
        wanted: "auto", "store" or "recompute" (`echo_memory`). With "auto" it is where layers are checkpointed, which
            gives time for memory anyway, and where more would be kept than a tenth of what plain LoRA keeps and than
            a sixteenth of the weights.
        echo: the echo's parts of the model.
        model: its sizes.
        tokens: of a micro-batch.
        engine_gathers: whether an engine follows every module that runs, to gather its weights (DeepSpeed ZeRO-3).

    Raises:
        ValueError: "recompute" was asked for and cannot be had.
    """
    if wanted == "store" or (wanted == "auto" and not (model.checkpointing and _much(echo, model, tokens))):
        return False
    why_not = None
    if engine_gathers and model.checkpointing:
        why_not = "DeepSpeed ZeRO-3 follows every module of a layer, and parts of a layer would run by themselves"
    else:
        try:
            require_replay(echo.layers)
        except ValueError as error:
            why_not = str(error)
    if why_not is None:
        logger.info("Echo memory: what the echo pass computes is computed again in backward (echo_memory=%r).", wanted)
        return True
    if wanted == "auto":
        logger.info("Echo memory: what the echo pass computes is kept for backward: %s.", why_not)
        return False
    raise ValueError(f"echo_memory='recompute' cannot be had: {why_not}. Write echo_memory='store'.")


def _much(echo: EchoSetup, model: ModelShape, tokens: int) -> bool:
    """Whether the echo pass of such a micro-batch, half of it prompts and all routed, would keep much for backward."""
    layers = model.layers - model.first_target
    of_a_token = model.key_values if model.checkpointing else model.activations
    plain = model.hidden if model.checkpointing else model.activations
    kept = layers * of_a_token * model.itemsize * tokens / 2
    weights = sum(p.nbytes for p in echo.model.parameters())
    return kept > max(SMALL, OF_THE_WEIGHTS * weights, OF_PLAIN * model.layers * plain * model.itemsize * tokens)


def activations_dtype(args: Any) -> torch.dtype | None:
    """The dtype that autocast computes in; None without it."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
