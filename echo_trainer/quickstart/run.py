"""The quickstart: the embedded base before, after plain LoRA, and after Echo-LoRA with the same number of steps.

Everything is measured in the run that prints it. The base, its tokenizer and the data lie beside this file;
`recipes/quickstart/README.md` tells how they were made.
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..progress import Lines
from ..quiet import quiet_libraries

HERE = Path(__file__).resolve().parent
BASE, TRAIN, TEST = HERE / "base", HERE / "train.jsonl", HERE / "test.jsonl"
DATASET_NAME = "echo_trainer quickstart"
N_TEST = 200
"""Items of test.jsonl that the quickstart asks; the ablation asks all."""


@dataclass(frozen=True)
class Settings:
    """Hyperparameters of both runs; how they were found is in `recipes/quickstart/README.md`."""

    steps: int = 100
    batch_size: int = 16
    learning_rate: float = 2e-3
    r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    max_new_tokens: int = 12


def make_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = argparse.ArgumentParser(
        prog="echo-trainer quickstart",
        description="Fine-tune the small base that ships with echo_trainer on a task it cannot do yet, once with "
        "plain LoRA and once with Echo-LoRA, and compare both on held-out items. Offline, on the CPU, in about two "
        "minutes.",
    )
    parser.add_argument("--output_dir", default="echo-quickstart", help="folder of the finished Echo-LoRA adapter")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="optimizer steps of each of the two runs")
    parser.add_argument("--seed", type=int, default=0, help="seed of initialisation, data order and routing")
    return parser


def main(arguments: list[str]) -> int:
    """Entry point of `echo-trainer quickstart`."""
    options = make_parser().parse_args(arguments)
    if options.steps < 1:
        raise ValueError(f"--steps is {options.steps}; a run needs at least 1 step.")
    quickstart(Path(options.output_dir), Settings(steps=options.steps), options.seed, Console())
    return 0


def quickstart(output_dir: Path, settings: Settings, seed: int, console: Console) -> dict[str, float]:
    """
    Run the comparison and leave the Echo-LoRA adapter in `output_dir`.

    Returns:
        Exact-match accuracy on the held-out items of "base", "LoRA" and "Echo-LoRA".
    """
    from ..evaluation.results import add_to_run

    tests = [json.loads(line) for line in TEST.read_text(encoding="utf-8").splitlines()[:N_TEST]]
    console.print("[bold]Echo-LoRA quickstart[/bold]: one held-out item of the task\n")
    console.print(f"  {tests[0]['prompt']}[green]{tests[0]['completion']}[/green]\n", highlight=False)
    accuracy, seconds = {}, {}
    with quiet_libraries(), one_thread(), Lines(console) as progress:
        accuracy["base"] = _score(_load_base(), tests, settings, progress, "base, held-out items")
        for name, p_start, p_end in (("LoRA", 0.0, 0.0), ("Echo-LoRA", 1.0, 0.2)):
            trainer = _trainer(output_dir, settings, seed, p_start, p_end, progress, f"{name}, training")
            begin = time.perf_counter()
            trainer.train()
            seconds[name] = time.perf_counter() - begin
            progress.say(f"{name}, training: {settings.steps} steps in {seconds[name]:.0f} s")
            accuracy[name] = _score(trainer.model, tests, settings, progress, f"{name}, held-out items")
        trainer.save_model()
        add_to_run(output_dir, [_result(accuracy["Echo-LoRA"], len(tests))])
    console.print(_table(accuracy, seconds, settings, len(tests)))
    console.print(
        "One seed, an artificial task: the last two rows differ by luck as much as by method. Whether the echo helps "
        "is what `echo-trainer ablate` measures.\n"
    )
    console.print(f"The Echo-LoRA adapter is in [bold]{output_dir}[/bold]; its base is {BASE}.", soft_wrap=True)
    console.print("It is an ordinary PEFT adapter: see README.md in its folder.")
    return accuracy


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread: the base is so small that threads wait for each other, on a busy machine for minutes."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _load_base() -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


def _trainer(
    output_dir: Path, settings: Settings, seed: int, p_start: float, p_end: float, progress: Lines, label: str
) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback, TrainerCallback

    from ..config import EchoSFTConfig
    from ..trainer import EchoSFTTrainer

    class Bar(TrainerCallback):
        """Shows the steps in the quickstart's own progress bar."""

        def on_train_begin(self, args, state, control, **kwargs):
            self.task = progress.add_task(label, total=state.max_steps)

        def on_step_end(self, args, state, control, **kwargs):
            progress.advance(self.task)

    rows = [json.loads(line) for line in TRAIN.read_text(encoding="utf-8").splitlines()]
    trainer = EchoSFTTrainer(
        model=_load_base(),
        args=EchoSFTConfig(
            output_dir=str(output_dir),
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            warmup_steps=min(10, settings.steps),
            echo_p_start=p_start,
            echo_p_end=p_end,
            seed=seed,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            logging_steps=10,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            card_prompt="example",
        ),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.r,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules="all-linear",
        ),
        processing_class=_tokenizer(),
        callbacks=[Bar()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE)


def _score(model: Any, tests: list[dict[str, str]], settings: Settings, progress: Lines, label: str) -> float:
    from ..evaluation.generation import exact_match, greedy_answers

    task = progress.add_task(label, total=len(tests))
    answers = greedy_answers(
        model,
        _tokenizer(),
        [row["prompt"] for row in tests],
        max_new_tokens=settings.max_new_tokens,
        batch_size=50,
        advance=lambda n: progress.advance(task, n),
    )
    score = exact_match(answers, [row["completion"] for row in tests])
    progress.say(f"{label}: {score:.1%} of {len(tests)} right")
    return score


def _result(accuracy: float, n: int) -> dict[str, Any]:
    """The figure as `echo_run.json` and the card hold it."""
    from ..evaluation.results import wilson

    return {
        "task": "quickstart", "dataset": DATASET_NAME, "split": "test", "of": None, "metric": "exact_match",
        "value": accuracy, "n": n, "interval": wilson(round(accuracy * n), n), "seeds": None,
    }  # fmt: skip


def _table(accuracy: dict[str, float], seconds: dict[str, float], settings: Settings, n: int) -> Table:
    table = Table(
        title=f"exact match on {n} held-out items, {settings.steps} steps of {settings.batch_size}, one seed"
    )
    for column in ("", "accuracy", "training time"):
        table.add_column(column, justify="left" if not column else "right")
    for name, value in accuracy.items():
        table.add_row(name, f"{value:.1%}", f"{seconds[name]:.0f} s" if name in seconds else "")
    return table
