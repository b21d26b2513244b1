"""`echo-trainer distill`: options and progress around `recipe.distilling`."""

import dataclasses
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..config import EchoSFTConfig
from ..labelling.options import DistillOptions
from ..recipe.arguments import DataArguments, make_parser, parse
from ..recipe.distilling import RunArguments, distill_run
from .short_help import on_a_screen

HEAD = """echo-trainer distill RUN --prompts FILE --output_dir OUT [--OPTION VALUE ...]

Have a teacher answer prompts, then train the plain adapter on labelled rows and on its answers. RUN is the folder of
a run (for the echo: with a checkpoint that holds echo networks) or a checkpoint; FILE has rows of `prompt` only, text
or messages (json, jsonl, csv, parquet). OUT gets labels.jsonl (answers and scores, never published), checkpoints,
adapter and card. The same command goes on where it was stopped.

  echo-trainer distill runs/mine --prompts more.jsonl --dataset_name train.jsonl --output_dir runs/taught \\
      --ratio 1:2 --per_device_train_batch_size 12 --max_steps 150 --learning_rate 2e-3
  echo-trainer distill runs/mine --prompts more.jsonl --output_dir labels --n_samples 8 --label_only true
  echo-trainer distill runs/lora --teacher plain --prompts more.jsonl --ratio 0:1 --output_dir runs/self

Compare teachers at the same weights: RUN/checkpoint-N with --teacher echo, plain and base.
"""
FOOT = "All options: `echo-trainer distill --help-all`. The same names are the keys of a recipe (--config)."
TRAINING = (
    "output_dir overwrite_output_dir num_train_epochs max_steps learning_rate per_device_train_batch_size "
    "gradient_accumulation_steps max_length bf16 save_steps logging_steps report_to seed push_to_hub"
)
CLASSES = (RunArguments, DistillOptions, DataArguments, EchoSFTConfig)


def main(arguments: list[str]) -> int:
    """Entry point of `echo-trainer distill`."""
    if {"-h", "--help"} & set(arguments):
        print(help_text())
        return 0
    parser = make_parser("echo-trainer distill", CLASSES, description="See `echo-trainer distill --help`.")
    if "--help-all" in arguments:
        parser.print_help()
        return 0
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--run", *arguments]
    which, options, data, config = parse(arguments, parser, CLASSES)
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:

        def watch(prompts: list[Any]) -> Any:
            bar = progress.add_task(f"answering ({options.teacher})", total=len(prompts))

            def advance(n: int) -> None:
                progress.advance(bar, n)
                if progress.finished:  # what follows has a bar of its own
                    progress.stop()

            return advance

        outcome = distill_run(which, options, data, config, watch)
    found = outcome.counts
    console.print(
        f"{found['kept']} of {found['prompts']} prompts have an answer to train on ({found['empty']} empty, "
        f"{found['unfinished']} cut off, {found['unsure']} less sure than {options.min_confidence:g}). Answers and "
        f"scores: {outcome.labels}",
        soft_wrap=True,
    )
    return 0


def help_text(width: int | None = None) -> str:
    """Help on one screen."""
    groups = {
        "run and prompts": [field.name for field in dataclasses.fields(RunArguments) if field.name != "run"],
        "teacher and mixture": [field.name for field in dataclasses.fields(DistillOptions)],
        "labelled rows, as in the run": ["dataset_name", "prompt_column", "completion_column", "dataset_template"],
        "second training": TRAINING.split(),
    }
    return on_a_screen(HEAD, groups, FOOT, CLASSES, width)
