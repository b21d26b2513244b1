"""Arms with a second training: paired with the others, on prompts no seed drew, answered by their teacher."""

import json
from dataclasses import replace

import pytest
from ablation_cases import LABELS, do, tiny_recipe

from echo_trainer.ablation.arms import ARMS
from echo_trainer.ablation.comparison import CONTRASTS
from echo_trainer.ablation.plan import Run, digest, specification
from echo_trainer.ablation.run_one import Workbench

pytestmark = pytest.mark.slow

TAUGHT = [name for name, arm in ARMS.items() if arm.teacher]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    return tiny_recipe(folder, {"max_steps": 8}, arms=["lora", "lora-longer", "strong", *TAUGHT], **LABELS)


@pytest.fixture(scope="module")
def results(recipe, tmp_path_factory):
    bench, out = Workbench(recipe), tmp_path_factory.mktemp("out")
    return {arm: do(recipe, out, arm, bench=bench, seed=1, rate=0.05) for arm in recipe.arms}


def test_paired_and_then_taught(results):
    for arm, result in results.items():
        assert result["initial_weights"] == results["lora"]["initial_weights"], arm
        assert result["batches"][:8] == results["lora"]["batches"], arm
        assert ("labels" in result) == (arm in TAUGHT)
    before = {"strong-labels": "strong", "strong-plain-labels": "strong", "self-training": "lora-longer"}
    for arm, first in before.items():
        result = results[arm]
        assert result["batches"] == results[first]["batches"] and result["losses"] == results[first]["losses"]
        assert result["steps"] == results[first]["steps"] + 2
        assert result["flops"] == results[first]["flops"] + result["second"]["flops"] > results[first]["flops"]
        assert result["labels"]["teacher"] == ARMS[arm].teacher and result["labels"]["counts"]["prompts"] == 9
        assert result["labels"]["n_labelled"] == 20 and 0 <= result["labels"]["correct"] <= 1
        assert result["tasks"]["words"]["nll"] != results[first]["tasks"]["words"]["nll"]
        assert "echo_nll" not in result["tasks"]["words"]  # the taught adapter has no echo
    assert len({results[arm]["tasks"]["words"]["nll"] for arm in TAUGHT}) == 3
    json.dumps(results)  # as written


def test_results_of_other_arms_do_not_depend_on_the_section(recipe):
    without = replace(recipe, arms=["lora", "strong"], labels=None)
    for arm in ("lora", "strong"):
        run = Run(arm, "lora", 1, 0.01)
        assert digest(specification(recipe, run, {})) == digest(specification(without, run, {}))
    run = Run("strong-labels", "lora", 1, 0.01)
    other = replace(recipe, labels={**recipe.labels, "steps": 3})
    assert digest(specification(recipe, run, {})) != digest(specification(other, run, {}))
    assert specification(recipe, run, {})["teacher"] == "echo"


def test_every_taught_arm_is_contrasted():
    assert {one for one, _, _ in CONTRASTS} >= {"strong-labels", "self-training"}
    assert ("strong-labels", "self-training") in {(one, other) for one, other, _ in CONTRASTS}


def test_too_few_prompts(recipe, tmp_path):
    few = replace(recipe, labels={**recipe.labels, "prompts": 17})  # 40 rows, 4 held out, 20 drawn
    with pytest.raises(ValueError, match=r"asks for 17 prompts, and beside the 20 examples .* the pool has 16"):
        do(few, tmp_path, "self-training", seed=1)
