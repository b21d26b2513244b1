"""The learning rate of each family of arms, chosen on held-out training examples and never on test data."""

import math
import statistics
from pathlib import Path
from typing import Any

from .arms import find_arms
from .plan import Run, family_of
from .recipe import AblationRecipe
from .results import load_result


class NotChosenError(RuntimeError):
    """Runs that the choice needs are not finished."""


def choose_rates(recipe: AblationRecipe, output: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """
    For every adapter and family: `chosen`, and `held_out_nll` by rate (nats per answer, mean over `seeds`).

    With one rate nothing is compared. A rate at an end of the grid may not be the best there is; `at_the_end` says so.

    Raises:
        NotChosenError: a run of the grid has no result yet.
    """
    families = dict.fromkeys(family_of(arm, recipe.learning_rate_choice) for arm in find_arms(recipe.arms))
    return {
        adapter: {family: _choose(recipe, output, adapter, family) for family in families}
        for adapter in recipe.adapters
    }


def _choose(recipe: AblationRecipe, output: Path, adapter: str, family: str) -> dict[str, Any]:
    rates = sorted(recipe.learning_rates)
    if len(rates) == 1:
        return {"chosen": rates[0], "held_out_nll": {}, "seeds": [], "at_the_end": False}
    seeds = recipe.seeds[: recipe.learning_rate_seeds]
    looked = {rate: [load_result(output, Run(family, adapter, seed, rate)) for seed in seeds] for rate in rates}
    runs = {rate: [result for result in results if result is not None] for rate, results in looked.items()}
    missing = [f"{rate:g}" for rate, results in runs.items() if len(results) < len(seeds)]
    if missing:
        raise NotChosenError(f"{adapter}/{family} has no result yet for the learning rates {', '.join(missing)}.")
    scores = {rate: statistics.fmean(each["held_out_nll"] for each in results) for rate, results in runs.items()}
    best = min(rates, key=lambda rate: math.inf if math.isnan(scores[rate]) else scores[rate])
    return {
        "chosen": best,
        "held_out_nll": {f"{rate:g}": score for rate, score in scores.items()},
        "seeds": seeds,
        "at_the_end": best in (rates[0], rates[-1]),
    }
