"""`DistillingTrainer`: what a trainer needs to have prompts labelled and to learn from the labels."""

from typing import Any, Self

from ..run.publishing import PublishingTrainer
from .options import DistillOptions
from .phase import Distillation, distill
from .soft import LENGTHS, SoftLabels


class DistillingTrainer(PublishingTrainer):
    """
    Override: `compute_loss` and `log`, for rows that hold a teacher's distributions; all else is handed on.

    Attributes:
        unlabeled_dataset: rows with `prompt` only, for `distill`; None where there are none.
        soft: the loss on distributions; there before `__init__`.
        distillation: what this training is the second part of; None of a first one.
    """

    unlabeled_dataset: Any = None
    distillation: Distillation | None = None
    soft: SoftLabels

    def distill(
        self,
        options: DistillOptions | None = None,
        resume_from_checkpoint: str | bool | None = None,
        **training: Any,
    ) -> Self:
        """
        Have the prompts of `unlabeled_dataset` answered, and train the plain adapter on the answers as well.

        Call it after `train()`. The teacher is this trainer's model with its echo as it is now. Its answers, with
        their scores, are kept in labels.jsonl in the output folder of the second training: `distilled` in this one's,
        unless another is named. Called again, labelling goes on where it was stopped.

        ```python
        trainer = EchoSFTTrainer(..., unlabeled_dataset=prompts)
        trainer.train()
        student = trainer.distill(DistillOptions(ratio="1:2"), max_steps=150, learning_rate=2e-3)
        student.save_model()
        ```

        Args:
            options: who answers, how, and how answers are mixed with labelled rows; None is the default of each.
            resume_from_checkpoint: of the second training, as for `train`.
            training: options of `EchoSFTConfig` that differ in the second training; `push_to_hub` is off unless it is
                among them. With `max_steps` above 0 so many
                steps, else `num_train_epochs` times through the taught rows.

        Returns:
            The trainer of the second training, finished: an ordinary one without an echo, with its own log, record
            and checkpoints. It has trained the model of this one (with `start="fresh"` a new adapter on its base), so
            save with it.

        Raises:
            ValueError: there are no prompts or a row of them has an answer; no answer can be trained on; an option
                cannot work; labels of another teacher are in the folder.
        """
        return distill(self, options or DistillOptions(), resume_from_checkpoint, **training)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss; of batches that hold a teacher's distributions that of `labelling.soft`."""
        if LENGTHS not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = self.soft.loss(model, inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as TRL does, with what labelled and taught rows cost since the last log."""
        if "loss" in logs:
            logs.update(self.soft.drain())
        super().log(logs, start_time)
