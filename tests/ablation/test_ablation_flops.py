"""Counted FLOPs of a run are those that torch's counter finds while it trains, whatever form its echo passes have."""

import pytest
from ablation_cases import do, tiny_recipe, trainer_of
from models import adapted, tiny_model
from steps import PAPER, echo_setup, planned_batch, random_examples, step_gradients
from torch.utils.flop_counter import FlopCounterMode

from echo_trainer.ablation.flops import count_coefficients, step_sizes
from echo_trainer.ablation.run_one import Workbench
from echo_trainer.compat.flops import flop_counter
from echo_trainer.method import grouping
from echo_trainer.passes.echo import RECOMPUTED, ROWS, SUFFIX
from echo_trainer.passes.setup import plain_setup
from echo_trainer.quiet import quiet_libraries
from echo_trainer.run import pass_choice

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ablation")


def counted_training(trainer):
    """FLOPs of a training, without those of the proofs before it."""
    prove, proofs = trainer.batches.compare_passes, []

    def proved(*args):
        with flop_counter() as inner:
            result = prove(*args)
        proofs.append(inner.get_total_flops())
        return result

    trainer.batches.compare_passes = proved
    with quiet_libraries(), flop_counter() as counter:
        trainer.train()
    return counter.get_total_flops() - sum(proofs)


@pytest.mark.parametrize(
    ("arm", "echo_pass", "adapter"),
    [
        ("echo", "suffix", "lora"),
        ("strong", "suffix", "lora"),  # no gate, a gradient through z, other layers
        pytest.param("echo-predicting", "suffix", "dora", marks=pytest.mark.long),
        pytest.param("echo", "full", "dora", marks=pytest.mark.long),
    ],
)
def test_flops_of_a_run_are_what_the_counter_counts(folder, adapter, arm, echo_pass):
    upper = {"lora_layers": "last"} if arm == "strong" else {}
    recipe = tiny_recipe(folder, {"echo_pass": echo_pass, "gradient_accumulation_steps": 2, **upper})
    bench = Workbench(recipe)
    counted = counted_training(trainer_of(bench, folder, arm, adapter))
    assert do(recipe, folder / echo_pass, arm, bench=bench, adapter=adapter)["flops"] == counted


@pytest.mark.parametrize("memory", ["recompute", "store"])
@pytest.mark.parametrize("checkpointing", [True, pytest.param(False, marks=pytest.mark.long)])
def test_flops_of_a_run_of_several_forms(folder, monkeypatch, memory, checkpointing):
    """Some batches run whole rows, others suffixes in several passes; prefixes are computed again, layers too."""
    monkeypatch.setattr(grouping, "PASS", 0)
    monkeypatch.setattr(pass_choice, "whole_rows_cost_less", lambda plan, *args: plan.n_routed % 2 == 0)
    options = {"echo_memory": memory, "gradient_checkpointing": checkpointing, "max_steps": 6}
    recipe = tiny_recipe(folder, {**options, "echo_p_start": 0.6, "echo_p_end": 0.6})
    bench = Workbench(recipe)
    trainer = trainer_of(bench, folder, "echo")
    counted = counted_training(trainer)
    assert set(trainer.sizes()) == {ROWS, RECOMPUTED if memory == "recompute" else SUFFIX}
    found = do(recipe, folder / f"{memory}-{checkpointing}", "echo", bench=bench)["flops"]
    assert found == counted


def test_attention_on_a_cpu_is_counted():
    """torch's own counter leaves its fused kernel out, forward and backward; an eager one is of matrix products."""
    counts = {}
    for attention in ("sdpa", "eager"):
        model = adapted(tiny_model(attention=attention))
        batch, plan = planned_batch(random_examples(3, seed=8), suffix=True)
        setup = echo_setup(model)
        with flop_counter() as counter, FlopCounterMode(display=False) as torchs:
            step_gradients(model, setup, batch, plan)
        counts[attention] = counter.get_total_flops(), torchs.get_total_flops()
    assert counts["eager"][0] == counts["eager"][1]
    # A fused kernel computes the scores again in backward.
    assert counts["sdpa"][0] > counts["eager"][0] > counts["sdpa"][1]


def test_flops_without_echo():
    model = adapted(tiny_model())
    coefficients = count_coefficients(plain_setup(model.get_base_model()), PAPER, ROWS, "answer", False)
    batch, plan = planned_batch(random_examples(3, seed=8), suffix=True, p=0.0)
    setup = echo_setup(model)
    with flop_counter() as counter:
        step_gradients(model, setup, batch, plan)
    assert step_sizes(*batch["input_ids"].shape, plan) @ coefficients == counter.get_total_flops()
