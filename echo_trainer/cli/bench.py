"""`echo-trainer bench`: options, progress, table and plot around `bench.run_bench`."""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..plots import ECHO, INK, PLAIN, figure, tidy, write
from ..quiet import quiet_libraries

MATRIX_SHARE = 0.2
"""Of a plain step; below it the time ratios say more about overhead than about the echo."""
TABLE_WIDTH = 140


def make_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    from ..bench.step import SHAPES, VARIANTS, BenchOptions

    parser = argparse.ArgumentParser(
        prog="echo-trainer bench",
        description="Measure a training step of plain LoRA in trl.SFTTrainer, and of this trainer with the echo off, "
        "with the suffix pass and with the full pass, on the same batches in interleaved rounds, with random weights.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = BenchOptions()
    parser.add_argument("--shape", choices=list(SHAPES), default=default.shape, help="shape of the model")
    parser.add_argument("--prompt", type=int, default=default.prompt, help="prompt tokens of a sample")
    parser.add_argument("--answer", type=int, default=default.answer, help="answer tokens of a sample")
    parser.add_argument(
        "--lengths",
        default=None,
        metavar="FILE|lognormal|uniform",
        help="let lengths differ: around --prompt and --answer, or as the lines of a file say (prompt answer)",
    )
    parser.add_argument("--packed", action="store_true", help="samples of a step one after the other, no padding")
    parser.add_argument("--batch", type=int, default=default.batch, help="samples a step")
    parser.add_argument("--rounds", type=int, default=default.rounds, help="measured steps of each variant")
    parser.add_argument("--warmup", type=int, default=default.warmup, help="unmeasured steps of each variant")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=default.dtype, help="dtype of the weights")
    parser.add_argument("--checkpointing", action="store_true", help="use gradient checkpointing in all variants")
    parser.add_argument("--dora", action="store_true", help="use DoRA in all variants")
    parser.add_argument("--r", type=int, default=default.r, help="rank of the adapter")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=[], help="run these only")
    parser.add_argument("--no_memory", action="store_true", help="skip the extra processes that measure CPU memory")
    parser.add_argument("--output", default=None, help="write OUTPUT.json and OUTPUT.png")
    return parser


def main(arguments: list[str]) -> int:
    """Entry point of `echo-trainer bench`."""
    options = vars(make_parser().parse_args(arguments))
    output, memory = options.pop("output"), not options.pop("no_memory")
    for name in ("prompt", "answer", "batch", "rounds", "r"):
        if options[name] < 1:
            raise ValueError(f"--{name} is {options[name]}; it must be at least 1.")
    if options["answer"] < 2:
        raise ValueError("--answer is 1: the echo starts at the first answer token and would reach nothing. Use 2.")
    from ..bench.compare import run_bench, save_json
    from ..bench.step import BASELINE, VARIANTS, BenchOptions

    options["variants"] = tuple(options["variants"])
    bench = BenchOptions(**options)
    console = Console()
    if console.width < TABLE_WIDTH:
        console = Console(width=TABLE_WIDTH)
    columns = (TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with quiet_libraries(), Progress(*columns, console=console) as progress:
        n_variants = len(bench.variants or VARIANTS)
        task = progress.add_task("building", total=(bench.rounds + bench.warmup) * n_variants)
        result = run_bench(bench, lambda name: progress.update(task, description=name, advance=1), memory)
    console.print(table(result))
    if caveat := small_shape(result, BASELINE):
        console.print(caveat, highlight=False)
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        save_json(result, f"{output}.json")
        plot(result, f"{output}.png")
        console.print(f"Written: {output}.json, {output}.png")
    return 0


def table(result: dict[str, Any]) -> Table:
    """The result as a table; ratios are to plain LoRA, those of saved and peak bytes counted by operation."""
    options, machine = result["options"], result["machine"]
    title = (
        f"{options['shape']}, {options['batch']} x ({options['prompt']} + {options['answer']}) tokens, "
        f"{options['lengths'] + ' lengths, ' if options['lengths'] else ''}{'packed, ' if options['packed'] else ''}"
        f"{options['dtype']}{', DoRA' if options['dora'] else ''}"
        f"{', checkpointing' if options['checkpointing'] else ''} on {machine['device']}"
    )
    shown = Table(title=title)
    columns = (
        "", "median", "ratio", "mean ratio", "tokens/s", "GFLOP", "ratio", "memory", "ratio", "saved", "peak",
        "run/real", "padding",
    )  # fmt: skip
    for column in columns:
        shown.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, row in result["variants"].items():
        peak = row["peak_memory"]
        shown.add_row(
            name,
            f"{row['median_s']:.3f} s",
            f"{row['time_ratio']:.3f}",
            f"{row['mean_time_ratio']:.3f}",
            f"{row['tokens_per_s']:.0f}",
            f"{row['flops'] / 1e9:.1f}",
            f"{row['flops_ratio']:.3f}",
            f"{peak / 2**30:.2f} GiB" if peak else "-",
            f"{row['memory_ratio']:.3f}" if peak else "-",
            _ratio(row["saved_bytes_ratio"]),
            _ratio(row["counted_peak_ratio"]),
            f"{row['run_of_real']:.2f}" if row["tokens"]["run"] else "-",
            f"{row['padding']:.0%}" if row["tokens"]["run"] else "-",
        )
    return shown


def small_shape(result: dict[str, Any], baseline: str) -> str | None:
    """What to think of the times where matrix products take a small part of a plain step; None where they do not."""
    row, rate = result["variants"][baseline], result["machine"]["matrix_rate_tflops"] * 1e12
    share = row["flops"] / (row["median_s"] * rate) if rate else 1.0
    if share >= MATRIX_SHARE:
        return None
    return (
        f"Matrix products at this machine's best rate would take {share:.0%} of a plain step. The rest is overhead "
        f"of a shape this small, which an echo step has about twice: its time ratios are not those of a larger model. "
        f"Read the GFLOP ratios, or measure a larger shape or batch."
    )


def _ratio(value: float | None) -> str:
    return f"{value:.3f}" if value else "-"


def plot(result: dict[str, Any], path: str) -> None:
    """Bars of the time and FLOP ratios to plain LoRA."""
    rows = result["variants"]
    drawn = figure(7.5, 0.9 + 0.6 * len(rows))
    axis = drawn.subplots()
    for offset, key, label, colour in ((-0.2, "mean_time_ratio", "time", PLAIN), (0.2, "flops_ratio", "FLOPs", ECHO)):
        places = [place + offset for place in range(len(rows))]
        bars = axis.barh(places, [row[key] for row in rows.values()], 0.38, label=label, color=colour)
        axis.bar_label(bars, fmt="%.2f", padding=3)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.invert_yaxis()
    axis.axvline(1, color=INK, linewidth=0.9)
    axis.set_xlabel("ratio to a step of plain LoRA in SFTTrainer")
    axis.margins(x=0.12)
    tidy(axis, "x")
    axis.legend(frameon=False)
    write(drawn, path)
