"""The echo networks of a checkpoint on the disk, with what must be known to go on with them."""

import json
import os
from dataclasses import dataclass
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

ECHO_WEIGHTS = "echo_networks.safetensors"
UNNAMED = {"gate": "sigmoid", "detach": True, "loss": "sum", "layers": None}
"""Options of the echo that older checkpoints do not name, as they were then."""


@dataclass(frozen=True)
class EchoWeights:
    """
    Networks and what goes with them; all but the tensors are JSON values.

    Attributes:
        tensors: parameters of the networks by name.
        options: of the echo that they were trained for.
        passes: `PassChoice.state`.
        probation: `Probation.state`.
        seen: `EchoMetrics.seen`; older checkpoints have none.
    """

    tensors: dict[str, Tensor]
    options: dict[str, Any]
    passes: dict[str, Any]
    probation: dict[str, Any]
    seen: dict[str, int]


def write_echo_weights(checkpoint: str, weights: EchoWeights) -> None:
    """Write them into the folder of a checkpoint."""
    names = {"echo": "options", "passes": "passes", "probation": "probation", "seen": "seen"}
    metadata = {name: json.dumps(getattr(weights, attribute)) for name, attribute in names.items()}
    save_file(weights.tensors, os.path.join(checkpoint, ECHO_WEIGHTS), metadata=metadata)


def has_echo_weights(checkpoint: str) -> bool:
    """Whether the folder of a checkpoint holds echo networks."""
    return os.path.isfile(os.path.join(checkpoint, ECHO_WEIGHTS))


def read_echo_weights(checkpoint: str) -> EchoWeights:
    """
    Read them.

    Raises:
        ValueError: the checkpoint holds none.
    """
    path = os.path.join(checkpoint, ECHO_WEIGHTS)
    if not os.path.isfile(path):
        raise ValueError(
            f"The checkpoint {checkpoint} holds no {ECHO_WEIGHTS}, so the echo networks cannot go on from it. "
            f"It was saved with save_only_model=True or without the echo. Continue from another checkpoint, or "
            f"start a new run from its adapter: PeftModel.from_pretrained(model, {checkpoint!r}, "
            f"is_trainable=True)."
        )
    with safe_open(path, framework="pt") as file:
        states = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    return EchoWeights(
        tensors=tensors,
        options={**UNNAMED, **states.get("echo", {})},
        passes=states.get("passes", {}),
        probation=states.get("probation", {}),
        seen=states.get("seen", {}),
    )
