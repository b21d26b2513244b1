"""What a resumed run needs beside the optimizer: the beams in use.

Beams are used for `num_iterations` steps, with the log-probabilities of the model that made them. TRL makes new ones
when a run is resumed, from the model of that step, so a run resumed in between is another run.
"""

import time
from pathlib import Path
from typing import Any

import torch

BEAMS = "beam_groups_{}.pt"
"""In a checkpoint, one for each process."""


class Resumption:
    """
    The beams in use, in checkpoints.

    Args:
        host: a `compat.beams.BeamJointTrainer`.

    Attributes:
        seconds_before: spent on training up to the checkpoint that the run goes on from.
    """

    def __init__(self, host: Any):
        self.host = host
        self._begin(0.0)

    def begin(self) -> None:
        """Forget the beams of an earlier call of `train`: they are of the model and the rows of that time."""
        self._begin(0.0)
        self.host.micro_steps, self.host.generated = 0, None

    def save(self, folder: str) -> None:
        """Write micro-batches and time spent, and the beams in use where they are not used up, into a checkpoint."""
        host = self.host
        in_use = bool(host.micro_steps % self._shape()["generate_every"])
        state = {
            "micro_steps": host.micro_steps,
            "seconds": self.seconds_before + time.monotonic() - self._since,
            "shape": self._shape(),
            "generated": host.generated if in_use else None,
        }
        torch.save(state, self._path(folder))

    def load(self, folder: str | None) -> None:
        """
        Go on with the beams of a checkpoint.

        Raises:
            ValueError: the checkpoint has none of this process, or they were made with other options.
        """
        if folder is None:
            return
        path, host = self._path(folder), self.host
        if not path.is_file():
            raise ValueError(
                f"The checkpoint {folder} has no {path.name}: it is not of BeamGRPOTrainer, or of fewer processes. "
                f"Resume with the same number of processes, or start a new run from its adapter."
            )
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["shape"] != self._shape():
            raise ValueError(
                f"The checkpoint {folder} was made with {_in_words(state['shape'])}, and the run now has "
                f"{_in_words(self._shape())}. Write the same options and start as many processes, or start a new run "
                f"from its adapter."
            )
        self._begin(state["seconds"])
        host.micro_steps = state["micro_steps"]
        if state["generated"] is not None:
            host.generated = [_on(batch, host.accelerator.device) for batch in state["generated"]]

    def _begin(self, seconds_before: float) -> None:
        self.seconds_before, self._since = seconds_before, time.monotonic()

    def _path(self, folder: str) -> Path:
        return Path(folder, BEAMS.format(self.host.accelerator.process_index))

    def _shape(self) -> dict[str, int]:
        args = self.host.args
        return {
            "num_processes": self.host.accelerator.num_processes,
            "generate_every": args.steps_per_generation * args.num_iterations,
            "num_generations": args.num_generations,
            "per_device_train_batch_size": args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
        }


def _on(batch: dict[str, Any], device: Any) -> dict[str, Any]:
    """A micro-batch on a device; `torch.load` does not know "cpu:0", which a process among others has."""
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def _in_words(shape: dict[str, int]) -> str:
    named = {**shape, "steps_per_generation * num_iterations": shape["generate_every"]}
    del named["generate_every"]
    return ", ".join(f"{name} {value}" for name, value in named.items())
