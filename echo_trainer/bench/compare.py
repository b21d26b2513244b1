"""`echo-trainer bench`: what an echo step costs beside a step of plain LoRA in `trl.SFTTrainer`.

All variants share one set of frozen random weights and see the same batches, in interleaved rounds, so that whatever
else the machine does hits all of them alike. Ratios of medians are reported, and counted floating-point operations
beside them, which do not depend on the machine.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from .step import BASELINE, VARIANTS, BenchOptions, Stepper, random_model


def run_bench(
    options: BenchOptions, advance: Callable[[str], None] = lambda text: None, measure_memory: bool = True
) -> dict[str, Any]:
    """
    Measure the variants.

    Args:
        options: what to measure.
        advance: called with a word on what comes next, once a step, for a progress bar.
        measure_memory: on a CPU, run three steps of every variant in a process of its own for its peak memory.

    Returns:
        `options`, `machine`, and by variant the median step time (s), tokens/s, counted FLOPs, peak memory (bytes;
        of the device, or on a CPU of the whole process), bytes counted operation by operation (held between forward
        and backward, and at most) and the ratios of all of them to the baseline; tokens that the echo pass runs beside
        the batch's, and the share of them that is padding, in the last step.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = [BASELINE, *(options.variants or [name for name in VARIANTS if name != BASELINE])]
    base = random_model(options, device)
    with tempfile.TemporaryDirectory() as folder:
        steppers = {name: Stepper(name, base, options, folder) for name in dict.fromkeys(names)}
        times: dict[str, list[float]] = {name: [] for name in steppers}
        memory = dict.fromkeys(steppers, 0)
        for round_number in range(-options.warmup, options.rounds):
            for name, stepper in steppers.items():
                advance(name)
                seconds, peak = stepper.timed_step(max(round_number, 0), device)
                if round_number >= 0:
                    times[name].append(seconds)
                    memory[name] = max(memory[name], peak)
        flops = {name: stepper.counted_step() for name, stepper in steppers.items()}
        counted = {name: stepper.counted_bytes() for name, stepper in steppers.items()} if measure_memory else {}
        for name, stepper in steppers.items():
            check_pass(name, stepper.ran())
    tokens = {name: stepper.tokens for name, stepper in steppers.items()}
    rows = {
        name: {
            "median_s": statistics.median(times[name]),
            "mean_s": statistics.fmean(times[name]),
            "times_s": times[name],
            "tokens_per_s": tokens[name].real / statistics.median(times[name]),
            "tokens": asdict(tokens[name]),
            "run_of_real": tokens[name].run / tokens[name].real,
            "padding": 1 - tokens[name].run_real / tokens[name].run if tokens[name].run else None,
            "saved_bytes": counted[name][0] if counted else None,
            "counted_peak": counted[name][1] if counted else None,
            "flops": flops[name],
            "peak_memory": memory[name],
        }
        for name in times
    }
    for row in rows.values():
        # A run with falling p is a sum of unequal steps: its price is the ratio of means, not of medians.
        row["time_ratio"] = row["median_s"] / rows[BASELINE]["median_s"]
        row["mean_time_ratio"] = row["mean_s"] / rows[BASELINE]["mean_s"]
        for key in ("saved_bytes", "counted_peak"):
            row[f"{key}_ratio"] = row[key] / rows[BASELINE][key] if row[key] else None
        row["flops_ratio"] = row["flops"] / rows[BASELINE]["flops"]
    if device.type == "cpu" and measure_memory:
        for name, row in rows.items():
            advance(f"memory of {name}")
            row["peak_memory"] = _peak_alone(name, options)
    for row in rows.values():
        row["memory_ratio"] = row["peak_memory"] / rows[BASELINE]["peak_memory"] if row["peak_memory"] else None
    rate = matrix_rate(device, getattr(torch, options.dtype))
    for row in rows.values():
        row["share_of_matrix_rate"] = row["flops"] / row["median_s"] / rate
    return {"options": asdict(options), "machine": describe_machine(device, rate), "variants": rows}


def check_pass(name: str, ran: str | None) -> None:
    """
    A row must be what its name says.

    Raises:
        RuntimeError: another pass ran than the row's name promises.
    """
    promised = next((form for form in ("suffix", "full") if name.startswith(form)), None)
    if ran != promised:
        raise RuntimeError(
            f"The row {name!r} ran {ran or 'no'} echo pass, so its figures would be those of something else. Report "
            f"this with the output of `echo-trainer env`."
        )


def _peak_alone(name: str, options: BenchOptions) -> int:
    """Peak resident memory in bytes of a process that runs three steps of one variant and nothing else."""
    code = (
        "import json, resource, sys; from echo_trainer.bench.compare import run_alone; "
        "run_alone(*json.loads(sys.argv[1])); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    arguments = json.dumps([name, asdict(options)])
    run = subprocess.run([sys.executable, "-c", code, arguments], capture_output=True, text=True, check=True)
    return int(run.stdout.split()[-1]) * 1024


def run_alone(name: str, options: dict[str, Any]) -> None:
    """Three steps of one variant (the body of `_peak_alone`)."""
    bench = BenchOptions(**options)
    with tempfile.TemporaryDirectory() as folder:
        stepper = Stepper(name, random_model(bench, torch.device("cpu")), bench, folder)
        for round_number in range(3):
            stepper.step(round_number)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measured FLOP/s of a large matrix product, the best of five."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        torch.matmul(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * n**3 / best


def describe_machine(device: torch.device, rate: float) -> dict[str, Any]:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "matrix_rate_tflops": round(rate / 1e12, 3),
    }


def save_json(result: dict[str, Any], path: str) -> None:
    """Write a result of `run_bench`."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(result, file, indent=2)
        file.write("\n")
