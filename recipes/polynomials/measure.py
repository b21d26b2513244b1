"""Measure BGRPO and GRPO from the same start, at beam widths 1, 2, 5 and 10, with the exact verifier.

    python recipes/polynomials/measure.py choose base runs     # a learning rate for each arm, on other seeds
    python recipes/polynomials/measure.py report base runs     # that, then the reported seeds, results/ and the table
    python recipes/polynomials/measure.py equal base runs      # afterwards, not planned: GRPO at the rate of BGRPO

One core. A run that is finished is kept: the same command goes on after the last one. See README.md, which was
written before the reported seeds were run.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from datasets import Dataset
from peft import LoraConfig
from polynomials import make_rows, right
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from echo_trainer import BeamGRPOConfig, BeamGRPOTrainer
from echo_trainer.ablation.statistics import compare, holm
from echo_trainer.bgrpo.accuracy import WIDTHS, best_scores
from echo_trainer.bgrpo.rewards import simple
from echo_trainer.bgrpo.scoring import BeamReward
from echo_trainer.plots import DASHES, ECHO, INK, PLAIN, THIRD, figure, legend_below, tidy, write

ARMS = ("grpo", "bgrpo")
RATES = (5e-5, 2e-4)
CHOICE_SEEDS, SEEDS = (100,), (0, 1, 2, 3, 4)
STEPS, WIDTH, PROMPTS, LONGEST = 40, 10, 20, 12
TEST, VALIDATION = (10, 300), (11, 150)
"""Seed and number of the rows; `make_base.py` has kept the test rows out of the base's training."""
RESULTS = Path(__file__).parent / "results"

SHARED = {
    "max_steps": STEPS,
    "per_device_train_batch_size": PROMPTS * WIDTH,
    "gradient_accumulation_steps": 1,
    "num_generations": WIDTH,
    "num_iterations": 2,
    "beta": 0.01,
    "max_grad_norm": 0.5,
    "scale_rewards": "none",
    "loss_type": "bnpo",
    "use_bias_correction_kl": False,
    "max_completion_length": LONGEST,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 5,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 5,
    "disable_tqdm": True,
}


def held_out() -> tuple[list[dict], list[dict]]:
    """Test and validation rows, with no prompt in common."""
    test = make_rows(TEST[1], TEST[0])
    return test, make_rows(VALIDATION[1], VALIDATION[0], frozenset(row["prompt"] for row in test))


def trainer_of(arm: str, base: str, seed: int, rate: float, out: Path):
    """The trainer of a run: the same prompts in the same order for both arms of a seed."""
    test, validation = held_out()
    prompts = make_rows(3000, 1000 + seed, frozenset(row["prompt"] for row in test + validation))
    common = {
        "model": base,
        "train_dataset": Dataset.from_list([{"prompt": row["prompt"]} for row in prompts]),
        "processing_class": AutoTokenizer.from_pretrained(base),
        "peft_config": LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    }
    options = {**SHARED, "output_dir": str(out / "trainer"), "seed": seed, "learning_rate": rate}
    if arm == "bgrpo":
        return BeamGRPOTrainer(verifier=right, args=BeamGRPOConfig(**options), **common)
    reward = BeamReward(right, simple, False, lambda: WIDTH)  # 1 or -0.1, whatever the place in the group
    return GRPOTrainer(reward_funcs=reward, args=GRPOConfig(temperature=1.0, **options), **common)


def hits(model, tokenizer, rows) -> dict[str, list[float]]:
    """By width, whether one of the beams of each row is right."""
    return {str(width): best_scores(model, tokenizer, rows, right, width, LONGEST, 50) for width in WIDTHS}


def run(arm: str, base: str, seed: int, rate: float, out: Path, rows: list[dict], name: str) -> dict:
    """One run, or what it left."""
    path = out / f"{name}-{arm}-{rate:g}-{seed}.json"
    if path.is_file():
        return json.loads(path.read_text())
    begun, cpu = time.perf_counter(), time.process_time()
    trainer = trainer_of(arm, base, seed, rate, out)
    trainer.train()
    trained = time.process_time() - cpu
    found = {
        "arm": arm,
        "seed": seed,
        "rate": rate,
        "hits": hits(trainer.model, trainer.processing_class, rows),
        "cpu_seconds": {"training": trained, "all": time.process_time() - cpu},
        "seconds": time.perf_counter() - begun,
        "history": [entry for entry in trainer.state.log_history if "loss" in entry],
    }
    path.write_text(json.dumps(found))
    means = {width: round(float(np.mean(values)), 3) for width, values in found["hits"].items()}
    print(f"{path.stem}: {means}, {found['seconds']:.0f} s", flush=True)
    return found


def start(base: str, out: Path, rows: list[dict], name: str) -> dict:
    """The SFT-only arm: the base itself."""
    path = out / f"{name}-sft.json"
    if not path.is_file():
        model = AutoModelForCausalLM.from_pretrained(base)
        path.write_text(json.dumps({"hits": hits(model, AutoTokenizer.from_pretrained(base), rows)}))
    found = json.loads(path.read_text())
    print(f"{path.stem}: { {width: round(float(np.mean(v)), 3) for width, v in found['hits'].items()} }", flush=True)
    return found


def choose(base: str, out: Path) -> dict[str, float]:
    """The rate of each arm with the best mean over all widths, on validation rows and seeds that are not reported."""
    _, rows = held_out()
    start(base, out, rows, "validation")
    chosen = {}
    for arm in ARMS:
        means = {}
        for rate in RATES:
            runs = [run(arm, base, seed, rate, out, rows, "validation") for seed in CHOICE_SEEDS]
            means[rate] = float(np.mean([list(r["hits"].values()) for r in runs]))
        chosen[arm] = max(means, key=lambda rate: means[rate])
        print(arm, {f"{rate:g}": round(mean, 4) for rate, mean in means.items()}, "best", chosen[arm], flush=True)
    return chosen


def report(base: str, out: Path) -> None:
    """Run the reported seeds, and write `results/`: figures, table and picture."""
    write_results(choose(base, out), base, out, "results")


def equal(base: str, out: Path) -> None:
    """The same with one rate for both arms: that of BGRPO."""
    rate = choose(base, out)["bgrpo"]
    write_results(dict.fromkeys(ARMS, rate), base, out, "equal-rate")


def write_results(rates: dict[str, float], base: str, out: Path, name: str) -> None:
    """Run every arm and seed at its rate, and write figures, table and picture of `name`."""
    rows, _ = held_out()
    runs = {"sft": [start(base, out, rows, "test")] * len(SEEDS), **{arm: [] for arm in ARMS}}
    for seed in SEEDS:  # both arms of a seed one after the other: what is there can be compared at any time
        for arm in ARMS:
            runs[arm].append(run(arm, base, seed, rates[arm], out, rows, "test"))
    scores = {
        arm: {w: np.array([one["hits"][str(w)] for one in found]) for w in WIDTHS} for arm, found in runs.items()
    }
    summary = summarise(scores)
    summary["cpu_minutes"] = sum(one["cpu_seconds"]["all"] for arm in ARMS for one in runs[arm]) / 60
    summary["rates"], summary["seeds"] = rates, list(SEEDS)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(summary, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(table(summary))
    draw(summary, RESULTS / f"{name}.png")
    print(table(summary))


def summarise(scores: dict[str, dict[int, np.ndarray]]) -> dict:
    """
    Accuracies and paired differences, in points.

    Args:
        scores: by arm and width, 0 or 1 for each seed and prompt, (S, I).
    """
    pairs = [("bgrpo", "grpo"), ("bgrpo", "sft"), ("grpo", "sft")]
    accuracy = {arm: {str(w): _points(compare([found[w]])) for w in WIDTHS} for arm, found in scores.items()}
    differences = [
        {"arms": [a, b], "width": w, **_points(compare([scores[a][w] - scores[b][w]]))}
        for a, b in pairs
        for w in WIDTHS
    ]
    primary = next(d for d in differences if d["arms"] == ["bgrpo", "grpo"] and d["width"] == WIDTH)
    others = [d for d in differences if d is not primary]
    for one, corrected in zip(others, holm([d["p"] for d in others]), strict=True):
        one["p_corrected"] = corrected
    return {"accuracy": accuracy, "differences": differences, "n_items": scores["sft"][1].shape[1]}


def _points(found) -> dict:
    values = {"value": found.difference, "low": found.low, "high": found.high}
    return {**{name: round(100 * value, 2) for name, value in values.items()}, "p": found.p}


def table(summary: dict) -> str:
    """The tables of README.md."""
    names = {"sft": "SFT only", "grpo": "GRPO", "bgrpo": "BGRPO"}
    widths, rule = "greedy | width 2 | width 5 | width 10 |", "|---|---|---|---|---|"
    lines = [f"| right of {summary['n_items']} prompts, % | {widths}", rule]
    for arm, name in names.items():
        found = summary["accuracy"][arm]
        lines.append(f"| {name} | " + " | ".join(f"{found[str(w)]['value']:.1f}" for w in WIDTHS) + " |")
    lines += ["", f"| difference, points [95 %] | {widths}", rule]
    for a, b in (("bgrpo", "grpo"), ("bgrpo", "sft"), ("grpo", "sft")):
        cells = [
            f"{d['value']:+.1f} [{d['low']:+.1f}, {d['high']:+.1f}]"
            for d in summary["differences"]
            if d["arms"] == [a, b]
        ]
        lines.append(f"| {names[a]} - {names[b]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(summary: dict, path: Path) -> None:
    """Accuracy by width: SFT before, both arms after, with intervals over seeds and prompts."""
    drawn = figure(11, 4)
    left, right_axis = drawn.subplots(1, 2)
    kinds = {"sft": ("SFT only (before)", PLAIN), "grpo": ("GRPO", THIRD), "bgrpo": ("BGRPO", ECHO)}
    for (arm, (label, colour)), dashes in zip(kinds.items(), DASHES, strict=False):
        values = [summary["accuracy"][arm][str(w)]["value"] for w in WIDTHS]
        left.plot(WIDTHS, values, label=label, color=colour, linestyle=dashes, marker="o", linewidth=1.8)
    left.set(ylabel="right, % of test prompts")
    pairs = {("bgrpo", "grpo"): ("BGRPO - GRPO", ECHO), ("bgrpo", "sft"): ("BGRPO - SFT", PLAIN),
             ("grpo", "sft"): ("GRPO - SFT", THIRD)}  # fmt: skip
    for i, (pair, (label, colour)) in enumerate(pairs.items()):
        found = [d for d in summary["differences"] if tuple(d["arms"]) == pair]
        places = [w * (1 + 0.05 * (i - 1)) for w in WIDTHS]
        values = np.array([d["value"] for d in found])
        reach = np.abs([[d["low"], d["high"]] for d in found] - values[:, None]).T
        right_axis.errorbar(places, values, reach, label=label, color=colour, marker="o", capsize=3, linestyle="none")
    right_axis.set(ylabel="difference, points (95 %)")
    right_axis.axhline(0, color=INK, linewidth=0.9)
    for axis in (left, right_axis):
        axis.set(xlabel="beam width", xscale="log")
        axis.set_xticks(WIDTHS, [str(w) for w in WIDTHS])
        axis.minorticks_off()
        tidy(axis)
        legend_below(axis)
    write(drawn, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["choose", "report", "equal"])
    parser.add_argument("base")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    {"choose": choose, "report": report, "equal": equal}[arguments.what](arguments.base, arguments.out)
