"""The second training of an arm: prompts of the pool that its seed did not draw, answered by its teacher."""

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from ..labelling.options import DistillOptions
from .arms import ARMS
from .data import order_of
from .plan import Run
from .recipe import AblationRecipe
from .trainer import AblationTrainer


def train_on_labels(
    recipe: AblationRecipe, pool: list[dict[str, Any]], run: Run, trainer: AblationTrainer, scratch: Path
) -> tuple[AblationTrainer, dict[str, Any]]:
    """
    Label and train on, as the arm of a run and the section `labels` of the recipe say.

    Args:
        recipe: with such a section.
        pool: the examples that each seed draws its own from.
        run: of an arm that has a teacher.
        trainer: after its first training.
        scratch: for labels.

    Returns:
        The trainer of the second training, and for the result: counts, confidence, and the share of the labels that
        are right, which nobody was told.

    Raises:
        ValueError: the pool has too few prompts.
    """
    assert recipe.labels is not None  # the recipe has looked
    section = dict(recipe.labels)
    rest = [pool[i] for i in order_of(pool, run.seed)[recipe.train_limit :]][: section.pop("prompts")]
    if len(rest) < recipe.labels["prompts"] or not all("prompt" in row for row in rest):
        raise ValueError(
            f"`labels` asks for {recipe.labels['prompts']} prompts, and beside the {recipe.train_limit} examples that "
            f"a seed draws the pool has {len(rest)}; each needs `prompt`. Ask for fewer."
        )
    trainer.unlabeled_dataset = Dataset.from_list([{"prompt": row["prompt"]} for row in rest])
    training = {"max_steps": section.pop("steps"), "learning_rate": section.pop("learning_rate")}
    options = DistillOptions(
        teacher=str(ARMS[run.arm].teacher), label_batch_size=recipe.evaluation_batch_size, **section
    )
    student = trainer.distill(options, **training, output_dir=str(scratch / "labels"))
    assert student.distillation is not None  # it is a second training
    taught = student.distillation.taught
    right = [_said(each.row["completion"]) == _said(rest[each.index]["completion"]) for each in taught]
    return student, {**student.distillation.record, "correct": float(np.mean(right))}


def _said(completion: Any) -> str:
    """An answer as text."""
    return (completion if isinstance(completion, str) else completion[-1]["content"]).strip()
