"""What an echo step costs on batches of very different lengths, with the code as it is and as it was before.

    python recipes/benchmarks/mixes.py [--before dc086ab] [--rounds 2]

The table of README.md. Every trainer is a process of its own (mixes_step.py), with this checkout or one of the commit
`--before` on its path; they take turns, one step each, and all but one wait. Layouts are those of the whole lengths;
steps run on lengths cut down by the same factor for all (`Mix.scale`), with gradient checkpointing. The commit before
needs transformers 5.23.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from layouts import LLAMA_3_8B, MIXES

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SUFFIX, FULL = ({"echo_p_end": 1.0, "echo_pass": name} for name in ("suffix", "full"))
# name: (whether it is the code before, options of the echo)
VARIANTS = {
    "plain LoRA": (False, None),
    "full, before": (True, FULL),
    "full, after": (False, FULL),
    "suffix, before": (True, SUFFIX),
    "suffix, stored": (False, {**SUFFIX, "echo_memory": "store"}),
    "suffix, recomputed": (False, {**SUFFIX, "echo_memory": "recompute"}),
}


@dataclass(frozen=True)
class Mix:
    """Lengths of a batch, whether it is packed, and by what they are divided for the steps that run."""

    prompts: np.ndarray
    answers: np.ndarray
    packed: bool
    scale: int

    def case(self, scale: int, echo: dict | None, steps: int) -> dict:
        """A `mixes_step.Case`."""
        prompts, answers = (
            np.maximum(np.round(x / scale).astype(int), least).tolist()
            for x, least in ((self.prompts, 1), (self.answers, 2))
        )
        return {"prompts": prompts, "answers": answers, "packed": self.packed, "echo": echo, "steps": steps}


PACKED_SCALE = 32
MIX_OF = {
    name: Mix(*lengths, packed=not name.startswith("256"), scale=1 if name.startswith("256") else PACKED_SCALE)
    for name, lengths in MIXES.items()
}


class Step:
    """A process that runs a step for each line that it is sent."""

    def __init__(self, checkout: Path, case: dict):
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "mixes_step.py"), json.dumps(case)],
            env=environment(checkout),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def __call__(self) -> dict:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(map(str, self.process.args[:2]))} ended with {self.process.wait()}.")
        return json.loads(line)

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", default="dc086ab", help="commit to compare with")
    parser.add_argument("--rounds", type=int, default=2, help="timed steps of each variant")
    parser.add_argument("--mixes", nargs="*", default=list(MIX_OF), choices=list(MIX_OF))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", options.before], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "x", "-C", folder], input=archive, check=True)
        print(
            "| mix | variant | run / real | GiB kept (8B) | saved bytes | peak bytes | FLOPs | CPU s |\n"
            "|---|---|---|---|---|---|---|---|"
        )
        for name in options.mixes:
            for row in rows(MIX_OF[name], (ROOT, Path(folder)), options.rounds):
                print(f"| {name} | {row} |", flush=True)
        print("\n| | workers | plan, ms | fetch, collate, draw and plan, ms |\n|---|---|---|---|")
        for workers in ("0", "2"):
            for name, checkout in (("before", Path(folder)), ("after", ROOT)):
                found = data_cost(checkout, workers)
                print(f"| {name} | {workers} | {found['plan_ms']:.1f} | {found['thread_ms']:.1f} |", flush=True)


def rows(mix: Mix, checkouts: tuple[Path, Path], rounds: int) -> list[str]:
    """The rows of a mix: of its layouts, then of steps in turns, as ratios to plain LoRA."""
    layouts = {name: layout_of(mix, checkouts[before], echo) for name, (before, echo) in VARIANTS.items() if echo}
    steps = {
        name: Step(checkouts[before], mix.case(mix.scale, echo, rounds + 2))
        for name, (before, echo) in VARIANTS.items()
    }
    figures = {name: [] for name in steps}
    for _ in range(rounds + 2):
        for name, step in steps.items():
            figures[name].append(step())
    for step in steps.values():
        step.end()
    # The first step proves the passes, the second one is counted.
    cpu = {name: float(np.median([step["cpu_s"] for step in taken[2:]])) for name, taken in figures.items()}
    counted = {name: taken[1] for name, taken in figures.items()}
    plain = counted["plain LoRA"]
    found = []
    for name, its in counted.items():
        ratios = [its[key] / plain[key] for key in ("saved_bytes", "peak_bytes", "flops")]
        run, kept = layouts.get(name, ("-", "-"))
        found.append(
            f"{name} | {run} | {kept} | {' | '.join(f'{x:.2f}' for x in ratios)} "
            f"| {cpu[name]:.2f} ({cpu[name] / cpu['plain LoRA']:.2f}) "
        )
    return found


def data_cost(checkout: Path, workers: str) -> dict[str, float]:
    """What data_cost.py finds with the code of a checkout."""
    done = subprocess.run(
        [sys.executable, str(HERE / "data_cost.py"), "--workers", workers],
        env=environment(checkout), check=True, capture_output=True, text=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def environment(checkout: Path) -> dict[str, str]:
    """Variables of a process that runs the code of a checkout."""
    return {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}


def layout_of(mix: Mix, checkout: Path, echo: dict) -> tuple[str, str]:
    """Tokens that an echo pass runs beside the real ones of it, and GiB it keeps at Llama-3-8B's shape."""
    shape = LLAMA_3_8B
    if echo["echo_pass"] == "full":
        real = int((mix.prompts + mix.answers).sum())
        run = real if mix.packed else len(mix.prompts) * int((mix.prompts + mix.answers).max())
        return f"{run / real:.2f}", f"{shape.layers * shape.itemsize * shape.hidden * run / 2**30:.1f}"
    step = Step(checkout, mix.case(1, echo, 0))
    layout = step()
    step.end()
    real = int((mix.answers - 1).sum())
    kept = 0 if echo.get("echo_memory") == "recompute" else layout["kept"]
    width = shape.hidden * layout["run"] + shape.key_values * kept
    gib = (shape.layers - shape.first_target) * shape.itemsize * width / 2**30
    return f"{layout['run'] / real:.2f}", f"{gib:.1f}"


if __name__ == "__main__":
    main()
