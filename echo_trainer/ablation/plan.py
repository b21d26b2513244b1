"""The runs of an ablation, and what each is made of, so that old results are never taken for new ones."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .arms import ARMS, BASELINE, Arm, find_arms
from .recipe import AblationRecipe

# Options that cannot change a result.
_NO_MATTER = ("model_name_or_path", "output_dir", "logging_steps", "dataloader_num_workers", "use_cpu", "report_to")
_NOT_SPEC = ("arms", "adapters", "seeds", "learning_rates", "learning_rate_choice", "learning_rate_seeds",
             "evaluation_batch_size", "train")  # fmt: skip


@dataclass(frozen=True)
class Run:
    """
    One training and its evaluation.

    Attributes:
        arm, adapter, seed, learning_rate: what distinguishes it.
        max_steps: number of steps where it is not the recipe's (`lora-compute-matched`).
    """

    arm: str
    adapter: str
    seed: int
    learning_rate: float
    max_steps: int | None = None

    @property
    def id(self) -> str:
        """Its folder below `runs`."""
        return f"{self.adapter}/{self.arm}/lr{self.learning_rate:g}/seed{self.seed}"


def family_of(arm: Arm, choice: str) -> str:
    """The arm on which the learning rate of `arm` is chosen."""
    if choice == "shared":
        return BASELINE
    if choice == "arm" and arm.flops_of is None:
        return arm.name
    return arm.family


def selection_runs(recipe: AblationRecipe) -> list[Run]:
    """Runs that the choice of learning rates needs, on the first `learning_rate_seeds`; none with a single rate."""
    if len(recipe.learning_rates) == 1:
        return []
    families = dict.fromkeys(family_of(arm, recipe.learning_rate_choice) for arm in find_arms(recipe.arms))
    return [
        Run(family, adapter, seed, rate)
        for seed in recipe.seeds[: recipe.learning_rate_seeds]
        for adapter in recipe.adapters
        for family in families
        for rate in recipe.learning_rates
    ]


def final_runs(recipe: AblationRecipe, rates: dict[str, dict[str, float]]) -> list[Run]:
    """
    The runs that are compared, seed by seed, so that an interrupted ablation has whole pairs.

    Args:
        recipe: what to compare.
        rates: chosen learning rate by adapter and family.
    """
    return [
        Run(arm.name, adapter, seed, rates[adapter][family_of(arm, recipe.learning_rate_choice)])
        for seed in recipe.seeds
        for adapter in recipe.adapters
        for arm in find_arms(recipe.arms)
    ]


def specification(recipe: AblationRecipe, run: Run, fingerprints: dict[str, str]) -> dict[str, Any]:
    """
    Everything that decides the result of a run, without paths.

    Args:
        recipe, run: the run.
        fingerprints: of the base and of the data (`data.fingerprints`).
    """
    arm = ARMS[run.arm]
    fixed = {key: value for key, value in asdict(recipe).items() if key not in _NOT_SPEC}
    if recipe.train_draw == "once":  # as results say that know no other
        del fixed["train_draw"]
    arm_labels = fixed.pop("labels")  # results of other arms do not depend on it
    fixed["training"] = {key: value for key, value in sorted(recipe.training.items()) if key not in _NO_MATTER}
    fixed["tests"] = [{key: value for key, value in test.items() if key != "file"} for test in recipe.tests]
    arms = {"settings": arm.settings, "echo": arm.echo, **({"length": arm.length} if arm.length != 1 else {})}
    second = {"teacher": arm.teacher, "labels": arm_labels} if arm.teacher else {}
    return {**asdict(run), **arms, **second, **fixed, "fingerprints": fingerprints}


def digest(spec: dict[str, Any]) -> str:
    """A short hash of a specification."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]


def changed_parts(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """What differs between two specifications, in words."""
    changes = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changes += changed_parts(before, after, f"{prefix}{key}.")
        elif before != after:
            changes.append(f"{prefix}{key} was {before!r}, is {after!r}")
    return changes


def run_folder(output: Path, run: Run) -> Path:
    """Where a run's files are."""
    return output / "runs" / run.id
