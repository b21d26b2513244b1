"""`BeamJointTrainer`: `trl.GRPOTrainer` with public names for the private joints that beam GRPO needs.

Seen in trl 1.16 with transformers 5.23 and 5.24. A joint that is gone is named when a trainer is built: without it
completions would be samples, or a resumed run another one, without a word.

| private | of | why there is no public way |
|---|---|---|
| `_generate_single_turn` | trl | completions of a batch; a `rollout_func` must tokenize by itself, and warns |
| `generation_config`, `generation_kwargs` | trl | how completions are generated; TRL always samples |
| `_step`, `_buffered_inputs` | trl | completions serve several steps; a resumed run must go on with the same |
| `_get_train_sampler` | trl | permutations come one after the other; a resumed run begins with the first |
| `_save_optimizer_and_scheduler`, `_load_optimizer_and_scheduler` | transformers | a checkpoint is written, read |
| `_save` | transformers | the final adapter is verified before it gets its name |
| `_push_from_checkpoint`, `_finish_current_push` | transformers | pushes only listed files, and says what failed |
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
import transformers
import trl
from peft import PeftModel
from torch.utils.data import Sampler
from transformers import GenerationConfig, PreTrainedModel
from trl import GRPOTrainer

from .trainer import PushJoints, SaveJoints

_METHODS = (
    "_generate_single_turn", "_get_train_sampler", "_save_optimizer_and_scheduler", "_load_optimizer_and_scheduler",
    "_save", "_push_from_checkpoint", "_finish_current_push",
)  # fmt: skip
_ATTRIBUTES = ("generation_config", "generation_kwargs", "_step", "_buffered_inputs")


def _gone(names: list[str]) -> RuntimeError:
    return RuntimeError(
        f"Beam GRPO uses {', '.join(names)} of trl.GRPOTrainer, which trl {trl.__version__} with transformers "
        f"{transformers.__version__} does not have any more; completions would be samples and no beams, or a resumed "
        f"run another one. Install the tested versions (`echo-trainer env` names them), or a newer echo_trainer."
    )


def require_beam_joints(trainer_class: type = GRPOTrainer) -> None:
    """
    Make sure that every private method that is overridden is still there to be called.

    Raises:
        RuntimeError: some are gone; the message names them and the installed versions.
    """
    if gone := [name for name in _METHODS if not callable(getattr(trainer_class, name, None))]:
        raise _gone(gone)


class BeamJoints(Protocol):
    """How completions come about; `generate` does what TRL does, with the prompts it is given."""

    def generate(self, generate: Callable[[list[list[int]]], Any], prompts: list[list[int]], width: int) -> Any:
        """Completions of `prompts`, whose groups of `width` are equal; (token ids of each row, None)."""


class ResumeJoints(Protocol):
    """What a resume needs beside the optimizer."""

    def begin(self) -> None:
        """Training begins; nothing is left of an earlier call."""

    def save(self, folder: str) -> None:
        """Write it into a checkpoint."""

    def load(self, folder: str | None) -> None:
        """Read it from a checkpoint (None: training begins anew)."""


class OrderByEpoch(Sampler):
    """
    TRL's sampler, with the permutation of an epoch where a run is resumed in it.

    TRL draws the permutations of all epochs from one generator, one after the other. A resumed run makes a new one.

    Args:
        sampler: TRL's `RepeatSampler`.
    """

    def __init__(self, sampler: Any):
        self.sampler = sampler
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose rows come next; data loaders call it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.sampler.seed)
            for _ in range(self.epoch):
                torch.randperm(self.sampler.num_samples, generator=self.sampler.generator)
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


class BeamJointTrainer(GRPOTrainer):
    """
    See the module's docstring.

    Attributes:
        model, num_generations, num_generations_eval, max_completion_length: TRL's, as they are once it is built.
        beams, saver, pushes, resumption: what the private methods are handed over to; there before `__init__`.
    """

    model: PeftModel | PreTrainedModel
    num_generations: int
    num_generations_eval: int
    max_completion_length: int
    beams: BeamJoints
    saver: SaveJoints
    pushes: PushJoints
    resumption: ResumeJoints

    def use_generation(self, options: dict[str, Any]) -> None:
        """
        Generate with these options from now on.

        Raises:
            RuntimeError: TRL keeps its own somewhere else now.
        """
        if gone := [name for name in _ATTRIBUTES if not hasattr(self, name)]:
            raise _gone(gone)
        self.generation_kwargs = options
        self.generation_config = GenerationConfig(**options, disable_compile=True)

    @property
    def micro_steps(self) -> int:
        """Micro-batches trained on so far; TRL generates when it is a multiple of those of a generation."""
        return self._step

    @micro_steps.setter
    def micro_steps(self, count: int) -> None:
        self._step = count

    @property
    def generated(self) -> list[dict[str, Any]] | None:
        """The completions in use, as the micro-batches of a generation; None before the first one."""
        return self._buffered_inputs

    @generated.setter
    def generated(self, batches: list[dict[str, Any]] | None) -> None:
        self._buffered_inputs = batches

    # The joints

    def _generate_single_turn(
        self, prompt_ids: Any, images: Any, multimodal_fields: Any, num_generations: int, *args: Any, **kwargs: Any
    ) -> Any:
        original = super()._generate_single_turn

        def generate(prompts: list[list[int]]) -> Any:
            return original(prompts, images, multimodal_fields, num_generations, *args, **kwargs)

        return self.beams.generate(generate, prompt_ids, num_generations)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return OrderByEpoch(super()._get_train_sampler(*args, **kwargs))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        self.resumption.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self.resumption.load(checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = output_dir if output_dir is not None else self.args.output_dir
        assert folder is not None  # the arguments put a name there
        self.saver.write(folder, partial(super()._save, state_dict=state_dict), state_dict)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self.pushes.checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        self.pushes.finish()
