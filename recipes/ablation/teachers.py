"""Other teachers than the strong echo, in the setting of `strong.yaml`: what each does to the plain path.

    bash recipes/ablation/teachers.sh runs/ablation-teachers                 # makes the data, then runs this
    bash recipes/ablation/teachers.sh runs/ablation-teachers --arms ema      # one of them beside the references

Every arm is trained with each seed and learning rate; a finished run is kept, and the same command goes on. An arm's
rate is the one with the lowest mean NLL on held-out training examples. `summary.json` and the printed table hold the
plain path, which is deployed, the teacher, and the paired difference of the plain path to `lora-longer`.
"""

import argparse
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from teacher_trainers import (
    Ema,
    EmaShort,
    EmaStrong,
    GivenNetworks,
    HiddenKD,
    HiddenKDUpper,
    Privileged,
    PrivilegedLate,
    PrivilegedShuffled,
    RDrop,
)

from echo_trainer.ablation.arms import ARMS, Arm
from echo_trainer.ablation.comparison import collect, paired
from echo_trainer.ablation.data import fingerprints
from echo_trainer.ablation.echoes import NETWORKS
from echo_trainer.ablation.evaluating import evaluate_run
from echo_trainer.ablation.files import ITEMS, RESULT
from echo_trainer.ablation.plan import Run, digest, run_folder, specification
from echo_trainer.ablation.recipe import AblationRecipe, load_recipe
from echo_trainer.ablation.results import is_finished, load_result
from echo_trainer.ablation.run_one import Workbench, build_trainer
from echo_trainer.ablation.trainer import AblationTrainer
from echo_trainer.files import write_json
from echo_trainer.progress import Lines
from echo_trainer.quiet import quiet_libraries

REFERENCES, COMPETITOR = ["lora", "lora-longer", "strong"], "lora-longer"
REFERENCE_RATE = 4e-3
PLAIN = {"echo_p_start": 0.0, "echo_p_end": 0.0}
STRONG = {"echo_preset": "strong"}
WHOLE = STRONG | {"echo_pass": "full"}

TEACHERS = {
    "r-drop-0.05": (RDrop, PLAIN | {"lora_dropout": 0.05}, "own"),
    "r-drop-0.1": (RDrop, PLAIN | {"lora_dropout": 0.1}, "own"),
    "ema": (Ema, PLAIN, "own"),
    "ema-0.9": (EmaShort, PLAIN, "own"),
    "ema-strong": (EmaStrong, WHOLE, "own"),
    "hidden-kd": (HiddenKD, WHOLE, "own"),
    "hidden-kd-upper": (HiddenKDUpper, WHOLE, "own"),
    "privileged": (Privileged, STRONG, "given"),
    "privileged-late": (PrivilegedLate, STRONG, "given"),
    "privileged-shuffled": (PrivilegedShuffled, STRONG, "given"),
}
NETWORKS["given"] = GivenNetworks
ARMS |= {name: Arm(name, str(of.__doc__), name, settings, echo) for name, (of, settings, echo) in TEACHERS.items()}


def train_and_evaluate(bench: Workbench, run: Run, spec: dict[str, Any], output: Path) -> None:
    """One run. Its result is written last: what is there is whole."""
    trainer_class = TEACHERS[run.arm][0] if run.arm in TEACHERS else AblationTrainer
    with tempfile.TemporaryDirectory() as scratch, quiet_libraries():
        trainer = build_trainer(bench, run, Path(scratch), lambda *_: None, trainer_class)
        bench.keep(run, trainer.train_dataset)
        trainer.train()
        tasks, items = evaluate_run(bench, trainer, lambda *_: None)
    result = {"hash": digest(spec), "spec": spec, "held_out_nll": tasks.pop("held-out")["nll"], "tasks": tasks}
    write_json(run_folder(output, run) / ITEMS, items)
    write_json(run_folder(output, run) / RESULT, result | {"batches": trainer.batch_checksums()})


def rates_of(recipe: AblationRecipe, arm: str) -> list[float]:
    """Those that are tried; for a reference `strong.yaml` has chosen out of four, on other seeds."""
    return [REFERENCE_RATE] if arm in REFERENCES else recipe.learning_rates


def choose(recipe: AblationRecipe, output: Path) -> dict[str, dict[str, Any]]:
    """The rate of each arm, by the mean held-out NLL of the rates that every seed was trained with."""
    rates = {}
    for arm in recipe.arms:
        there = {
            r: [load_result(output, Run(arm, "lora", seed, r)) for seed in recipe.seeds] for r in rates_of(recipe, arm)
        }
        scores = {r: float(np.mean([x["held_out_nll"] for x in found])) for r, found in there.items() if all(found)}
        if scores:
            rates[arm] = {"chosen": min(scores, key=scores.__getitem__), "held_out_nll": scores}
    return rates


def summarise(recipe: AblationRecipe, output: Path) -> dict[str, Any]:
    """Of every arm its figures at the rate that held-out examples choose, and its difference to the competitor."""
    rates = choose(recipe, output)
    known = {"lora": {"lora": {"chosen": REFERENCE_RATE}} | rates}
    runs, summary = collect(replace(recipe, arms=list(rates)), output, known)["lora"], {}
    for arm, found in runs.items():
        for seed, result in found.results.items():
            pairs = zip(result["batches"], runs[COMPETITOR].results[seed]["batches"], strict=False)
            assert all(mine == other for mine, other in pairs), f"{arm}, seed {seed}: other batches than {COMPETITOR}"
        tasks = {str(seed): result["tasks"]["stories"] for seed, result in found.results.items()}
        means = {key: float(np.mean([task[key] for task in tasks.values()])) for key in min(tasks.values(), key=len)}
        summary[arm] = {"rate": rates[arm], "seeds": tasks, "means": means}
        for key, of_the_echo in ((f"minus {COMPETITOR}", False), (f"teacher minus {COMPETITOR}", True)):
            pairs = {m: paired(found, runs[COMPETITOR], m, ["stories"], of_the_echo) for m in ("accuracy", "nll")}
            if arm != COMPETITOR and all(pairs.values()):
                summary[arm][key] = {metric: asdict(pair) for metric, pair in pairs.items() if pair}
    return summary


def table(summary: dict[str, Any]) -> str:
    """In Markdown; differences of the plain path in points, with their interval and by seed."""
    heads = [
        "arm",
        "held-out NLL by rate",
        "accuracy, %",
        "NLL",
        "teacher, %",
        "NLL",
        f"minus `{COMPETITOR}`",
        "by seed",
    ]
    lines = [f"| {' | '.join(heads)} |", f"{'|---' * len(heads)}|"]
    for arm, found in summary.items():
        means, taught = found["means"], "echo_nll" in found["means"]
        tried = ", ".join(f"{rate:g}: {nll:.3f}" for rate, nll in found["rate"]["held_out_nll"].items())
        cells = [f"`{arm}`", tried, f"{100 * means['accuracy']:.1f}", f"{means['nll']:.3f}"]
        cells += [f"{100 * means['echo_accuracy']:.1f}", f"{means['echo_nll']:.3f}"] if taught else ["", ""]
        if pair := found.get(f"minus {COMPETITOR}", {}).get("accuracy"):
            middle, low, high = (100 * pair[key] for key in ("difference", "low", "high"))
            by_seed = ", ".join(f"{100 * difference:+.1f}" for difference in pair["by_seed"])
            cells += [f"{middle:+.2f} [{low:+.2f}, {high:+.2f}]", by_seed]
        lines.append(f"| {' | '.join(cells + [''] * (len(heads) - len(cells)))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--arms", nargs="+", default=[*REFERENCES, *TEACHERS], choices=[*REFERENCES, *TEACHERS])
    parser.add_argument("--seeds", default="490-491")
    parser.add_argument("--learning_rates", nargs="+", type=float, default=[4e-3, 2e-3])
    options = parser.parse_args()
    arms = list(dict.fromkeys([COMPETITOR, *options.arms]))
    given = {"arms": arms, "seeds": options.seeds, "learning_rates": options.learning_rates}
    recipe = load_recipe(Path(__file__).with_name("strong.yaml"), **given)
    known, bench = fingerprints(recipe), Workbench(recipe)
    pairs = [(arm, rate) for arm in recipe.arms for rate in rates_of(recipe, arm)]
    runs = [Run(arm, "lora", seed, rate) for seed in recipe.seeds for arm, rate in pairs]
    with Lines(Console(), width=40) as bar:
        line = bar.add_task("runs", total=len(runs))
        for number, run in enumerate(runs, 1):
            spec = specification(recipe, run, known)
            if not is_finished(options.output, run, spec):
                train_and_evaluate(bench, run, spec, options.output)
            bar.update(line, advance=1, description=run.id)
            bar.say(f"{number} of {len(runs)}: {run.id}")
    summary = summarise(recipe, options.output)
    write_json(options.output / "summary.json", summary, indent=1)
    (options.output / "table.md").write_text(f"{table(summary)}\n")
    print(table(summary))


if __name__ == "__main__":
    main()
