"""What the comparison of the passes before the first step costs: time and peak memory of step 0 beside step 1.

    python recipes/benchmarks/proof_cost.py [--shape smollm2-135m] [--prompt 128] [--answer 8] [--batch 8]

Random weights, no data and no downloads. On a CPU the peak is that of the process, so it can only rise: the rise
during the comparison, and during the step after it, is what each of them needs beyond what was there before.
"""

import argparse
import json
import resource
import tempfile
import time

import torch

from echo_trainer.bench.step import SHAPES, BenchOptions, Stepper, random_model
from echo_trainer.quiet import quiet_libraries


def main() -> None:
    default = BenchOptions()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default=default.shape)
    for name in ("prompt", "answer", "batch"):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name))
    parser.add_argument("--checkpointing", action="store_true")
    options = BenchOptions(**vars(parser.parse_args()), rounds=6)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with quiet_libraries(), tempfile.TemporaryDirectory() as folder:
        stepper = Stepper("suffix, all routed", random_model(options, device), options, folder)
        proof, seconds, peaks = [], [], [peak(device)]
        prove = stepper.trainer.batches.compare_passes

        def timed(*args):
            begin = time.perf_counter()
            result = prove(*args)
            wait(device)
            proof.append(time.perf_counter() - begin)
            peaks.append(peak(device))
            return result

        stepper.trainer.batches.compare_passes = timed
        for round_number in range(options.rounds):
            begin = time.perf_counter()
            stepper.step(round_number)
            wait(device)
            seconds.append(time.perf_counter() - begin)
            peaks.append(peak(device))
    result = {
        "proof_s": sum(proof),
        "step_0_s": seconds[0],
        "later_steps_s": seconds[1:],
        "peak_before_gib": peaks[0] / 2**30,
        "peak_after_proof_gib": peaks[1] / 2**30,
        "peak_after_step_0_gib": peaks[2] / 2**30,
        "peak_after_step_1_gib": peaks[3] / 2**30,
    }
    print(json.dumps(result, indent=1))


def peak(device: torch.device) -> int:
    """Peak memory so far, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
