"""`echo-trainer ablate`: options, progress bar and summary around `ablation.schedule` and `ablation.report`."""

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import TaskID

from ..ablation.arms import ADAPTERS, ARMS
from ..ablation.recipe import CHOICES, load_recipe
from ..progress import Lines
from ..recipe.find import recipe_path


def make_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    arms = "\n".join(f"  {name:22}{arm.what}" for name, arm in ARMS.items())
    parser = argparse.ArgumentParser(
        prog="echo-trainer ablate",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measure which part of Echo-LoRA makes a difference: train every arm with several seeds,\n"
        "paired in initial weights and data order, and report paired differences to LoRA with intervals.\n"
        "Finished runs are kept: call it again after an interruption and it goes on.",
        epilog=f"arms:\n{arms}\n\n`lora` is always run, and `echo` where an arm needs its FLOPs.",
    )
    parser.add_argument("recipe", help="a YAML file with a section `ablation`, or the name of one that ships")
    parser.add_argument("--output", required=True, help="folder of runs and report; the same folder continues")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="arms to run instead of the recipe's")
    parser.add_argument("--adapters", nargs="+", choices=ADAPTERS, help="adapters instead of the recipe's")
    parser.add_argument("--seeds", help="seeds instead of the recipe's: 0-4, or 0,1,5")
    parser.add_argument("--learning_rates", nargs="+", type=float, help="grid instead of the recipe's; one: no choice")
    parser.add_argument("--learning_rate_choice", choices=CHOICES, help="one choice per family of arms, per arm, or "
                        "that of `lora` for all")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each in a process (default: 1)")
    parser.add_argument("--threads", type=int, help="CPU threads of each run (default: the cores, shared out)")
    parser.add_argument("--devices", nargs="+", metavar="INDEX", help="GPUs to spread the runs over, such as 0 1")
    parser.add_argument("--report-only", action="store_true", help="run nothing; write the report of what is there")
    return parser


def main(arguments: list[str]) -> int:
    """Entry point of `echo-trainer ablate`: 0 done, 1 some runs failed, 130 interrupted."""
    options = make_parser().parse_args(arguments)
    for name in ("jobs", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}; it must be at least 1.")
    recipe = load_recipe(  # before torch is loaded, which takes long
        recipe_path(options.recipe),
        arms=options.arms,
        adapters=options.adapters,
        seeds=options.seeds,
        learning_rates=options.learning_rates,
        learning_rate_choice=options.learning_rate_choice,
    )
    from ..ablation.data import fingerprints, load_examples, load_tests
    from ..ablation.schedule import Outcome, run_all
    from ..ablation.write import write_report
    from ..recipe.arguments import CLASSES
    from ..recipe.check import check_options
    from ..recipe.training import check_base

    output, console, outcome, status = Path(options.output), Console(), Outcome(), 0
    if not options.report_only:  # what is wrong is said here, not in each process
        check_options(options.recipe, recipe.training, CLASSES)
        load_examples(recipe)
        load_tests(recipe)
        training = recipe.training
        revision, own_code = training.get("model_revision"), bool(training.get("trust_remote_code"))
        check_base(training["model_name_or_path"], revision, own_code)
        try:
            with _Bar(console) as bar:
                outcome = run_all(
                    recipe, output, fingerprints(recipe), jobs=options.jobs, threads=options.threads,
                    devices=options.devices, progress=bar,
                )  # fmt: skip
        except KeyboardInterrupt:
            print("\nInterrupted. Finished runs are kept; the same command goes on.", file=sys.stderr)
            status = 130
    for run, error in outcome.failed.items():
        last = error.strip().splitlines()[-1]
        console.print(f"[red]failed[/red] {run}: {last}", highlight=False, markup=True, soft_wrap=True)
    if outcome.failed:
        console.print(
            f"{len(outcome.failed)} runs failed; error.txt in their folders has the rest. The same command tries "
            f"them again."
        )
        status = status or 1
    written = write_report(recipe, output)
    if written is None:
        console.print("No learning rate is chosen yet, so there is nothing to report.")
    else:
        console.print(f"Report: {written}", soft_wrap=True)
    return status


class _Bar:
    """Draws the runs: one bar for all, one line for each that is running."""

    def __init__(self, console: Console):
        self.progress = Lines(console, width=40)
        self.lines: dict[str, TaskID] = {}

    def __enter__(self) -> "_Bar":
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def start(self, total: int) -> None:
        self.all = self.progress.add_task("runs", total=total)
        self.total, self.done, self.begin = total, 0, time.monotonic()
        self.progress.say(f"{total} runs, one line for each that ends")

    def update(self, run: str, what: str, done: int, total: int) -> None:
        if run not in self.lines:
            self.lines[run] = self.progress.add_task(run, total=total)
        self.progress.update(self.lines[run], description=f"{run} {what}", completed=done, total=total)

    def finish(self, run: str, how: str) -> None:
        if run in self.lines:
            self.progress.remove_task(self.lines.pop(run))
        if how != "failed":
            self.progress.advance(self.all)
        self.done += 1
        minutes = (time.monotonic() - self.begin) / 60
        left = minutes / self.done * (self.total - self.done)
        self.progress.say(
            f"{run}: {how}; {self.done} of {self.total} after {minutes:.1f} minutes, about {left:.0f} left"
        )
