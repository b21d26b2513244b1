"""The report from stored results: tables, sentences and plot say what the numbers say, and nothing of this machine."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from ablation_cases import tiny_recipe

from echo_trainer import cli
from echo_trainer.ablation.files import ITEMS, RESULT
from echo_trainer.ablation.plan import Run, run_folder
from echo_trainer.ablation.write import write_report
from echo_trainer.files import write_json

N_ITEMS = 400


def store(
    output, arm, seed, right, nll, *, adapter="lora", rate=0.01, tasks=("words",), batches=(1, 2, 3), echo=None, **more
):
    """A finished run with given scores; `echo` are those of its echo pass."""
    generator = np.random.default_rng([seed, 5])
    difficulty, noise = np.random.default_rng(9).random(N_ITEMS), generator.normal(0, 0.01, N_ITEMS)
    items = {
        task: {
            "correct": (difficulty < right + generator.normal(0, 0.01)).astype(int).tolist(),
            "nll": (nll + difficulty + noise).tolist(),
            "prediction": [""] * N_ITEMS,
        }
        for task in tasks
    }
    for entry in items.values() if echo else ():
        entry["echo_correct"] = (difficulty < echo[0] + generator.normal(0, 0.01)).astype(int).tolist()
        entry["echo_nll"] = (echo[1] + difficulty + noise).tolist()
    result = {
        "run": {}, "initial_weights": f"w{seed}", "batches": list(batches), "steps": len(batches), "flops": 1e9,
        "training_seconds": 2.0, "training_cpu_seconds": 3.0, "peak_memory": 2**30, "device": "CPU", "held_out_nll": 1,
        "tasks": {
            t: {"accuracy": float(np.mean(v["correct"])), "nll": float(np.mean(v["nll"]))} for t, v in items.items()
        },
        **more,
    }  # fmt: skip
    folder = run_folder(output, Run(arm, adapter, seed, rate))
    write_json(folder / ITEMS, items)
    write_json(folder / RESULT, result)


@pytest.fixture
def recipe(tmp_path):
    return tiny_recipe(tmp_path, arms=["echo", "echo-zero", "echo-shuffled"], seeds=[0, 1, 2, 3, 4])


def report(recipe, output):
    return write_report(recipe, output).read_text(), json.loads((output / "summary.json").read_text())


def test_a_clear_difference_is_reported(recipe, tmp_path):
    for seed in range(5):
        store(tmp_path, "lora", seed, 0.5, 1.0)
        store(tmp_path, "echo", seed, 0.6, 0.8, flops=1.1e9)
        store(tmp_path, "echo-zero", seed, 0.5, 1.0)
    text, summary = report(recipe, tmp_path)
    row = summary["lora"]["arms"]["echo"]
    pair = row["accuracy"]["to_lora"]
    assert pair["low"] < 0.1 < pair["high"] and pair["holm"] < 0.01
    assert row["nll"]["to_lora"]["difference"] == pytest.approx(-0.2, abs=1e-3)
    assert row["flops_ratio"] == pytest.approx(1.1)
    assert "Accuracy: better than `lora`: `echo`" in text
    assert "NLL: better than `lora`: `echo`" in text
    assert "The injection alone (`echo` against `echo-zero`)" in text
    assert "| `echo` | 5 | 3 |" in text and "1.100" in text
    assert (tmp_path / "differences-lora.png").read_bytes().startswith(b"\x89PNG")
    assert "![paired differences](differences-lora.png)" in text
    assert str(tmp_path) not in text


def test_what_is_a_matter_of_the_weight_of_the_loss_is_called_so(recipe, tmp_path):
    for seed in range(5):
        store(tmp_path, "lora", seed, 0.5, 1.0, loss_weight=1.0)
        store(tmp_path, "echo", seed, 0.6, 0.8, loss_weight=1.6)
        store(tmp_path, "echo-zero", seed, 0.58, 0.85, loss_weight=1.6)
        store(tmp_path, "echo-no-routing", seed, 0.6, 0.8, loss_weight=2.0)
        store(tmp_path, "strong", seed, 0.6, 0.8, loss_weight=1.0)
    text, summary = report(replace(recipe, arms=["echo", "echo-zero", "echo-no-routing", "strong"]), tmp_path)
    line = next(line for line in text.splitlines() if line.startswith("- Weight of the loss"))
    assert "in `echo` (1.60), `echo-zero` (1.60), `echo-no-routing` (2.00) the cross-entropies" in line
    assert "The weight alone (`echo-zero` against `lora`): accuracy +9.65" in line
    assert "| `echo` | 5 | 3 | 1.60 |" in text and "| `strong` | 5 | 3 | 1.00 |" in text
    rows = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| `echo` - ")}
    assert "| 1.60 both |" in rows["| `echo` - `echo-zero`"]
    assert "| **1.60** - 2.00 |" in rows["| `echo` - `echo-no-routing`"]
    assert summary["lora"]["arms"]["echo"]["loss_weight"] == pytest.approx(1.6)


def test_results_of_before_there_was_a_weight_are_shown_without(recipe, tmp_path):
    for seed in range(5):
        store(tmp_path, "lora", seed, 0.5, 1.0)
        store(tmp_path, "echo", seed, 0.6, 0.8)
    text, _ = report(recipe, tmp_path)
    assert "Weight of the loss" not in text and "| `echo` | 5 | 3 | - |" in text


def test_the_echo_pass_beside_plain_paths(recipe, tmp_path):
    """Its figures are compared with those of its own adapter and of every LoRA that was trained."""
    for seed in range(5):
        store(tmp_path, "lora", seed, 0.5, 1.0)
        store(tmp_path, "lora-longer", seed, 0.55, 0.9)
        store(tmp_path, "strong", seed, 0.5, 1.0, echo=(0.7, 0.6))
    text, summary = report(replace(recipe, arms=["lora-longer", "strong"]), tmp_path)
    entries = {entry["other"]: entry for entry in summary["lora"]["echo_passes"]}
    assert [*entries] == ["strong", "lora", "lora-longer"]
    assert entries["lora-longer"]["nll"]["difference"] == pytest.approx(-0.3, abs=1e-3)
    assert entries["strong"]["accuracy"]["low"] > 0.1
    rows = text.split("The echo pass itself")[1].split("\n\n")[1].splitlines()[2:]
    assert len(rows) == 3 and "its own plain path | +" in rows[0] and "| `lora-longer` | +1" in rows[2]


def test_the_echo_pass_beside_that_of_a_control(recipe, tmp_path):
    for seed in range(5):
        store(tmp_path, "lora", seed, 0.5, 1.0)
        store(tmp_path, "strong", seed, 0.5, 1.0, echo=(0.7, 0.6))
        store(tmp_path, "strong-shuffled", seed, 0.5, 1.0, echo=(0.6, 0.9))
    text, summary = report(replace(recipe, arms=["strong", "strong-shuffled"]), tmp_path)
    (entry,) = (entry for entry in summary["lora"]["echo_passes"] if entry["other_echo"])
    assert (entry["arm"], entry["other"]) == ("strong", "strong-shuffled")
    assert entry["nll"]["difference"] == pytest.approx(-0.3, abs=1e-3)
    assert "| the echo pass of `strong-shuffled` | +" in text


def test_worse_is_called_worse(recipe, tmp_path):
    for seed in range(5):
        store(tmp_path, "lora", seed, 0.6, 0.8)
        store(tmp_path, "echo", seed, 0.5, 1.0)
    text, _ = report(recipe, tmp_path)
    assert "Accuracy: no arm beats `lora`. Worse: `echo`" in text


def test_the_same_on_every_item_is_no_precision(recipe, tmp_path):
    """All at 0 %: an interval of no width is no proof that the arms are equal."""
    for seed in range(5):
        for arm, nll in (("lora", 1.0), ("echo", 0.8), ("echo-zero", 1.0)):
            store(tmp_path, arm, seed, -1.0, nll)
    text, _ = report(recipe, tmp_path)
    assert "Accuracy: every arm has the same answers right as `lora`, item by item, so it says nothing" in text
    assert "accuracy the same on every item; NLL -0.2" in text
    assert "+0.00 [" not in text and "detectable 0 " not in text
    assert "NLL: better than `lora`: `echo`" in text


def test_runs_of_earlier_calls_stay_in_the_report(recipe, tmp_path):
    """A report holds what is there, also arms and adapters that this call does not name."""
    for seed in range(5):
        for arm in ("lora", "echo", "echo-zero", "echo-noise"):
            for adapter in ("lora", "dora"):
                store(tmp_path, arm, seed, 0.5, 1.0, adapter=adapter)
    _, summary = report(recipe, tmp_path)
    assert [*summary["lora"]["arms"]] == [*summary["dora"]["arms"]] == ["lora", "echo", "echo-zero", "echo-noise"]
    grid = replace(recipe, learning_rates=[0.01, 0.02])  # of the second rate there is no run of any arm but echo's
    for arm, seed in itertools.product(("lora", "echo"), range(5)):
        store(tmp_path, arm, seed, 0.5, 1.0, rate=0.02)
    _, summary = report(grid, tmp_path)
    assert [*summary] == ["lora"] and "echo-noise" in summary["lora"]["arms"]


def test_nothing_significant_names_what_would_have_been_found(recipe, tmp_path):
    for seed, luck in enumerate((0.05, -0.06, 0.03, -0.02, 0.01)):
        store(tmp_path, "lora", seed, 0.5 + luck, 1.0 + luck)
        store(tmp_path, "echo", seed, 0.5 - luck, 1.0 - luck)
    text, summary = report(recipe, tmp_path)
    pair = summary["lora"]["arms"]["echo"]["accuracy"]["to_lora"]
    assert pair["holm"] > 0.05
    assert "Accuracy: no arm differs significantly from `lora`" in text
    assert f"{pair['detectable'] * 100:.2g} points" in text


def test_seeds_that_are_missing_are_left_out(recipe, tmp_path):
    """Pairs are made of the seeds both have; one seed gives a difference without an interval."""
    for seed in range(3):
        store(tmp_path, "lora", seed, 0.5, 1.0)
    store(tmp_path, "echo", 2, 0.5, 0.9)
    store(tmp_path, "echo", 4, 0.9, 0.1)  # not compared: lora has no seed 4
    text, summary = report(recipe, tmp_path)
    pair = summary["lora"]["arms"]["echo"]["nll"]["to_lora"]
    assert pair["n_seeds"] == 1 and pair["low"] is None
    assert pair["difference"] == pytest.approx(-0.1)
    assert "no arm has two seeds" in text
    assert "nan" not in text


def test_unpaired_runs_are_named(recipe, tmp_path):
    for seed in range(2):
        store(tmp_path, "lora", seed, 0.5, 1.0)
        store(tmp_path, "echo", seed, 0.5, 1.0, batches=(1, 2, 4) if seed else (1, 2, 3))
    text, _ = report(recipe, tmp_path)
    assert "**Not paired:** echo, seed 1: other batches than lora." in text


def test_tasks_and_adapters(tmp_path):
    recipe = tiny_recipe(tmp_path, arms=["echo"], adapters=["lora", "dora"], seeds=[0, 1])
    for adapter in ("lora", "dora"):
        for seed in (0, 1):
            store(tmp_path, "lora", seed, 0.5, 1.0, adapter=adapter, tasks=("one", "two"))
            store(tmp_path, "echo", seed, 0.55, 1.0, adapter=adapter, tasks=("one", "two"))
    text, summary = report(recipe, tmp_path)
    assert "## LoRA" in text and "## DoRA" in text and "| arm | one (400) | two (400) |" in text
    row = summary["dora"]["arms"]["echo"]["accuracy"]
    each = [row["to_lora_by_task"][task]["difference"] for task in ("one", "two")]
    assert row["to_lora"]["difference"] == pytest.approx(np.mean(each))


def test_report_only_from_the_command_line(recipe, tmp_path, capsys):
    store(tmp_path / "out", "lora", 0, 0.5, 1.0)
    assert cli.main(["ablate", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "out"), "--report-only"]) == 0
    assert "report.md" in capsys.readouterr().out
    assert "| `lora` | 1 |" in (tmp_path / "out" / "report.md").read_text()
