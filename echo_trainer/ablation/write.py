"""Write the report of an ablation: `report.md`, a plot for each adapter and `summary.json`."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from ..files import write_json, write_text
from .arms import ADAPTERS, ARMS
from .choice import NotChosenError, choose_rates
from .comparison import summarise
from .files import RESULT
from .plot import forest_plot
from .recipe import AblationRecipe
from .report import render

REPORT, SUMMARY = "report.md", "summary.json"


def write_report(recipe: AblationRecipe, output: Path) -> Path | None:
    """
    Compute everything from the runs on disk and write it, those of arms and adapters that the recipe does not name (an
    earlier call did) included.

    Returns:
        The report's path; None where the learning rates are not chosen yet or `lora` has no finished run.
    """
    recipe = _with_what_is_there(recipe, output)
    try:
        rates = choose_rates(recipe, output)
    except NotChosenError:
        return None
    summary = summarise(recipe, output, rates)
    if not summary:
        return None
    plots = {}
    for adapter, part in summary.items():
        name = f"differences-{adapter}.png"
        if forest_plot(part, output / name, f"{adapter}: paired differences, 95 % intervals over seeds and items"):
            plots[adapter] = name
    write_json(output / SUMMARY, _without_nan(summary))
    write_text(output / REPORT, render(summary, public_recipe(recipe), plots))
    return output / REPORT


def _with_what_is_there(recipe: AblationRecipe, output: Path) -> AblationRecipe:
    """The recipe with more arms and adapters, as far as they have runs and their learning rate can be chosen."""
    found = {(path.parts[-5], path.parts[-4]) for path in output.glob(f"runs/*/*/lr*/seed*/{RESULT}")}
    wider = recipe
    for part in ("adapters", "arms"):
        for name in {"adapters": ADAPTERS, "arms": ARMS}[part]:
            if name in getattr(wider, part) or name not in {pair[part == "arms"] for pair in found}:
                continue
            candidate = replace(wider, **{part: [*getattr(wider, part), name]})
            try:
                choose_rates(candidate, output)
            except NotChosenError:
                continue
            wider = candidate
    return wider


def public_recipe(recipe: AblationRecipe) -> str:
    """The recipe as YAML without folders of this machine."""
    content: dict[str, Any] = asdict(recipe)
    training = content.pop("training")
    training["model_name_or_path"] = _name(training["model_name_or_path"])
    content["train"] = [_name(path) for path in content["train"]]
    content["tests"] = [{**test, "file": _name(test["file"])} for test in content["tests"]]
    return yaml.safe_dump({**training, "ablation": content}, sort_keys=False, width=110)


def _without_nan(value: Any) -> Any:
    """The value with None for NaN, which is not JSON."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _name(path: str) -> str:
    return Path(path).name if Path(path).exists() else path
