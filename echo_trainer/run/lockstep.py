"""Keep processes in step where their parameters are sharded.

FSDP2 and ZeRO-3 gather a module's parameters each time it runs, forward and backward, with every process taking part.
So every process must run the same modules equally often; one that skips an echo pass leaves the others waiting for
ever. ZeRO-2 fills its buckets in the order in which gradients arrive, which must be the same everywhere as well. There
every process runs an echo pass for every micro-batch: where nothing is routed one of a single token, of no weight. DDP
keeps an order of its own and needs only a gradient, zero at least, for every parameter.
"""

from typing import Any

from accelerate.utils import DistributedType
from torch import nn

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def needs_lockstep(accelerator: Any, model: nn.Module) -> bool:
    """
    Whether every process must run an echo pass for each micro-batch. The same answer on every process.

    Args:
        accelerator: of the trainer.
        model: its model, which transformers may have sharded while loading.
    """
    return accelerator.distributed_type in SHARDED or any(hasattr(p, "device_mesh") for p in model.parameters())


def checkpoint_without_reentry(args: Any) -> None:
    """
    Put gradient checkpointing back to non-reentrant where TRL has made it reentrant (for adapters under ZeRO-3).

    A reentrant checkpoint runs its layer without a graph, so the keys and values that the suffix pass builds on, and
    what the echo networks add inside, would get no gradient.
    """
    if (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        args.gradient_checkpointing_kwargs = {**args.gradient_checkpointing_kwargs, "use_reentrant": False}
