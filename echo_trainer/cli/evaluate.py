"""`echo-trainer evaluate`: options, progress and table around `evaluation.run.run_evaluation`."""

import argparse
import sys
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Evaluate an adapter or a model: on the eight commonsense tasks (LLM-Adapters), on GSM8K, or on any file of prompts and
completions. An interrupted evaluation continues with the same command. If the adapter lies in the folder of a finished
run, the figures go into its echo_run.json and its model card.
"""
EPILOG = """\
modes:
  generate  write an answer, take the first option name, the number or the whole text; the published protocol
            (LLM-Adapters: --num_beams 4)
  rank      the most likely of the answer options ("the correct answer is X"), one reading of each prompt; faster, and
            every answer is one of the options
  nll       negative log-likelihood of the row's answers, in nats per answer (the training loss is per token), on
            the tokens and labels of the training loss

In float32 the figures do not depend on --batch_size; in bfloat16 matrix products do, a little.

examples:
  echo-trainer evaluate runs/my-adapter --tasks commonsense --data llm-adapters/ --mode rank
  echo-trainer evaluate huggyllama/llama-7b --tasks boolq openbookqa --limit 200
  echo-trainer evaluate runs/my-adapter --tasks my-test.jsonl --max_new_tokens 100
  echo-trainer evaluate runs/my-adapter --tasks faq.csv --prompt_column question --completion_column answer \
      --mode nll --against base
  echo-trainer evaluate --with-echo runs/my-adapter --tasks my-test.jsonl --mode nll
"""


def make_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = argparse.ArgumentParser(
        prog="echo-trainer evaluate",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="ADAPTER_OR_MODEL", help="folder or Hub id of an adapter or of a model")
    parser.add_argument("--tasks", nargs="+", required=True, metavar="TASK",
                        help="boolq, piqa, social_i_qa, hellaswag, winogrande, ARC-Easy, ARC-Challenge, openbookqa, "
                        "commonsense (all of these that --data has), gsm8k, or a file (json, jsonl, csv, tsv, "
                        "parquet) with rows in a form that training takes, such as prompt and completion")  # fmt: skip
    parser.add_argument("--data", metavar="DIR", help="folder with TASK-test.json; without it the public datasets")
    parser.add_argument("--base", help="base of the adapter, in place of the one it names")
    parser.add_argument("--mode", choices=["generate", "rank", "nll"], default="generate",
                        help="how to answer (default: generate)")  # fmt: skip
    parser.add_argument("--template", choices=["alpaca", "chat"],
                        help="prompt template, the same as in training (default: alpaca; none for files)")  # fmt: skip
    parser.add_argument("--answer_marker", metavar="TEXT",
                        help="what stands before each answer in rows of text (default: as in training)")  # fmt: skip
    parser.add_argument("--prompt_marker", metavar="TEXT",
                        help="what stands before each prompt in a text of several turns")  # fmt: skip
    parser.add_argument("--prompt_column", metavar="NAME", help="column that holds the prompt, in files")
    parser.add_argument("--completion_column", metavar="NAME", help="column that holds the answer, in files")
    parser.add_argument("--against", metavar="base|ADAPTER|MODEL",
                        help="evaluate this on the same items as well, and print the paired difference")  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=32, help="items at a time (default: 32)")
    parser.add_argument("--num_beams", type=int, default=1, help="beams in mode generate (default: 1, greedy)")
    parser.add_argument("--max_new_tokens", type=int, help="longest answer (default: 32, gsm8k 256, files 64)")
    parser.add_argument("--limit", type=int, help="items of each task, drawn with --seed (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (default: 0)")
    parser.add_argument("--output", metavar="DIR|FILE.json",
                        help="where records and results go (default: evaluation/ in the model's folder)")  # fmt: skip
    parser.add_argument("--restart", action="store_true", help="delete earlier records of the same tasks and mode")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
                        help="dtype of the weights (default: float32 on a CPU, bfloat16 on a GPU)")  # fmt: skip
    parser.add_argument("--device", help="such as cuda:0 (default: a GPU where there is one)")
    parser.add_argument("--with-echo", "--with_echo", action="store_true",
                        help="evaluate the echo pass as well, with the own echo of each item and with another's: "
                        "ADAPTER is a checkpoint with echo networks, or the folder of a run that has one")  # fmt: skip
    parser.add_argument("--trust_remote_code", action="store_true", help="run code of the model's repository")
    return parser


def main(arguments: list[str]) -> int:
    """Entry point of `echo-trainer evaluate`: 0 done, 130 interrupted."""
    options = make_parser().parse_args(arguments)
    try:
        return _evaluate(options)
    except KeyboardInterrupt:
        print("\nInterrupted. The records are kept; the same command continues.", file=sys.stderr)
        return 130


def _evaluate(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from ..evaluation.adapter import evaluate_adapter, records_folder
    from ..evaluation.echo import echo_checkpoint
    from ..evaluation.run import harness_command
    from ..files import write_text
    from ..quiet import quiet_libraries

    console, seen = Console(), {}
    folder, file = output_places(options.output)
    model = str(echo_checkpoint(options.model)) if options.with_echo else options.model
    folder = folder or records_folder(model, options.with_echo)
    columns = (TextColumn("{task.description:16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with quiet_libraries(), Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        passes = iter(["", *([", echo pass", ", another's echo"] if options.with_echo else [f", {options.against}"])])

        def watch(loaded: Any, tasks: list[Any]) -> Any:
            whose = next(passes)
            seen.update(loaded=loaded, tasks=[task.name for task in tasks])
            bars = {
                task.name: progress.add_task(f"{task.name}{whose}", total=len(task.items), start=False)
                for task in tasks
            }

            def advance(task: Any, n: int) -> None:
                progress.start_task(bars[task.name])
                progress.advance(bars[task.name], n)

            return advance

        handled = ("model", "tasks", "output", "prompt_column", "completion_column")
        given = {name: value for name, value in vars(options).items() if name not in handled}
        given["columns"] = columns_of(options)
        summary = evaluate_adapter(model, options.tasks, output=folder, watch=watch, **given)
    console.print(table(summary))
    if options.with_echo:
        for other in ("plain", "other"):
            console.print(table_of_differences(summary, "echo", other))
    elif "differences" in summary:
        console.print(table_of_differences(summary, "this", "against", options.against))
    if options.mode == "generate":
        for task in seen["tasks"]:
            console.print(table_of_answers(task, folder))
    console.print(f"Records and results: {folder}", soft_wrap=True)
    if file is not None:
        write_text(file, (folder / f"results.{options.mode}.json").read_text(encoding="utf-8"))
        console.print(f"Results: {file}", soft_wrap=True)
    if summary["written"]:
        console.print(f"In {options.model} written: {summary['written']}.", soft_wrap=True)
    loaded = seen["loaded"]
    command = harness_command(loaded, seen["tasks"], loaded.identity["dtype"])
    if command:
        console.print("\nThe same model in lm-evaluation-harness (its prompts, so not the same figures):")
        console.print(f"  {command}", soft_wrap=True, highlight=False)
    return 0


def columns_of(options: argparse.Namespace) -> tuple[str, str] | None:
    """
    The columns that were named; None for none.

    Raises:
        ValueError: only one of them was.
    """
    names = options.prompt_column, options.completion_column
    if None not in names:
        return names
    if names != (None, None):
        raise ValueError("Name both columns, --prompt_column and --completion_column, or none.")
    return None


def output_places(output: str | None) -> tuple[Path | None, Path | None]:
    """Folder of the records if one was named, and the file that gets a copy of the results if one was."""
    if output is None:
        return None, None
    path = Path(output)
    return (path.with_suffix(""), path) if path.suffix == ".json" else (path, None)


def table_of_differences(summary: dict[str, Any], one: str, other: str, against: str = "") -> Any:
    """What is called `one` in the differences of a summary beside what is called `other`, as a table."""
    from rich.table import Table

    names = (other, one)
    shown_as = (against.rstrip("/").rsplit("/", 1)[-1] or {"other": "another's"}.get(other, other), one)
    what = {
        "plain": "the echo pass (training only) beside the plain path",
        "other": "the echo pass with the own echo beside the same with the echo of another item",
        "against": f"beside {against}",
    }[other]
    shown = Table(
        title=f"{what}, mode {summary['mode']}",
        caption=f"difference: {shown_as[1]} - {shown_as[0]}, paired by item, with its 95 % interval over items; one "
        "that holds zero is no evidence of a difference",
    )
    for column in ("task", "metric", *shown_as, "difference", "95 % interval", "items"):
        justify: Any = "left" if column in ("task", "metric") else "right"
        shown.add_column(column, justify=justify, no_wrap=column == "metric")
    for row in summary["differences"]:
        if other not in row:
            continue
        form, signed = ("{:.3f}", "{:+.3f}") if row["metric"] == "nll" else ("{:.1%}", "{:+.1%}")
        interval = " to ".join(signed.format(bound) for bound in row["interval"]) if row["interval"] else "-"
        both = [form.format(row[name]) for name in names]
        shown.add_row(
            row["task"], _with_unit(row["metric"]), *both, signed.format(row["difference"]), interval, str(row["n"])
        )
    return shown


def table(summary: dict[str, Any]) -> Any:
    """The results as a table with 95 % intervals."""
    from rich.table import Table

    shown = Table(title=f"mode {summary['mode']}, {summary['model']['dtype']}")
    for column in ("task", "metric", "value", "95 % interval", "items"):
        justify: Any = "left" if column in ("task", "metric") else "right"
        shown.add_column(column, justify=justify, no_wrap=column == "metric")
    rows = [*summary["results"], *([summary["average"]] if summary["average"] else [])]
    for row in rows:
        form = "{:.3f}" if row["metric"] == "nll" else "{:.1%}"
        interval = " to ".join(form.format(bound) for bound in row["interval"]) if row["interval"] else "-"
        shown.add_row(row["task"], _with_unit(row["metric"]), form.format(row["value"]), interval, str(row["n"]))
    return shown


def table_of_answers(task: str, folder: Path, most: int = 10) -> Any:
    """The first answers of a task beside the references, as they stand in its records."""
    from rich.table import Table

    from ..evaluation.records import read_records

    records = read_records(folder / f"{task}.generate.jsonl")[1]
    shown = Table(title=f"{task}: the first answers", show_lines=True)
    for column in ("", "reference", "answer"):
        shown.add_column(column, overflow="fold")
    for index in sorted(records)[:most]:
        record = records[index]
        written = record.text if record.text is not None else record.prediction
        shown.add_row("right" if record.correct else "wrong", _literal(record.reference), _literal(written.strip()))
    return shown


def _with_unit(metric: str) -> str:
    return "nll, nats per answer" if metric == "nll" else metric


def _literal(text: str) -> Any:
    """Text without markup, cut to what one reads."""
    from rich.text import Text

    return Text(text if len(text) <= 200 else text[:200] + " ...")
