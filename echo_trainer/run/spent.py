"""What a run has cost so far, the parts before its resumes included."""

import time
from dataclasses import dataclass
from typing import Any

from ..manifest import read_manifest
from .host import Host


@dataclass(frozen=True)
class Before:
    """
    The run up to the checkpoint that this part of it goes on from; all zero where there is none.

    Attributes:
        step: its optimizer step.
        seconds: spent on training.
        tokens: trained on, prompts included, over all processes.
    """

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0


class Spent:
    """Time and tokens of a trainer's run."""

    def __init__(self, host: Host):
        self.host = host
        self.begin(None)

    def begin(self, checkpoint: str | None) -> None:
        """A run begins, or goes on from a checkpoint; one of another trainer says nothing of what it had cost."""
        found = (read_manifest(checkpoint) if checkpoint else None) or {}
        self.before = Before(found.get("step", 0), **found.get("spent", {}))
        self._since, self._counted = time.monotonic(), self.host.tokens_trained_on

    def by_now(self) -> dict[str, Any]:
        """For the manifest of a checkpoint, as JSON values."""
        return {"seconds": self.before.seconds + time.monotonic() - self._since, "tokens": self.tokens}

    @property
    def tokens(self) -> int:
        """Of the whole run, over all processes; with an echo up to the last log."""
        if self.host.echo is not None:  # counted beside the echo networks of a checkpoint
            return self.host.echo_metrics.seen["input_tokens"]
        return self.before.tokens + self.host.tokens_trained_on - self._counted
