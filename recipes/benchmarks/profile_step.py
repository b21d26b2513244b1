"""Profile one optimizer step with the suffix pass: where the time goes, by operator and by stage.

    python recipes/benchmarks/profile_step.py --shape smollm2-135m --output runs/profile

Prints the heaviest operators and, on CUDA, every place where the host waits for the device; writes a Chrome trace.
"""

import argparse
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from echo_trainer.bench.step import SHAPES, VARIANTS, BenchOptions, Stepper, random_model

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "aten::_local_scalar_dense", "cudaMemcpyAsync")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2-135m")
    parser.add_argument("--variant", choices=list(VARIANTS), default="suffix, all routed")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--answer", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", default="runs/profile")
    options = parser.parse_args()
    bench = BenchOptions(options.shape, options.prompt, options.answer, options.batch, rounds=3, dtype=options.dtype)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    stepper = Stepper(options.variant, random_model(bench, device), bench, str(folder))
    for round_number in range(2):
        stepper.step(round_number)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        stepper.step(2)
        if device.type == "cuda":
            torch.cuda.synchronize()
    averages = profiler.key_averages()
    print(averages.table(sort_by=f"self_{device.type}_time_total", row_limit=25, max_name_column_width=40))
    for event in averages:
        if event.key in WAITS:
            print(f"{event.key}: {event.count} calls")
    profiler.export_chrome_trace(str(folder / "trace.json"))


if __name__ == "__main__":
    main()
