"""Kill a training run at random moments, resume it each time, and compare the final adapter bit for bit.

    OMP_NUM_THREADS=1 python tests/support/kill_runs.py --runs 100

A run of 8 steps (dropout, accumulation, gradient checkpointing, a checkpoint every 2 steps, a final save) goes on in
a process of its own. It is ended in one of five ways: SIGKILL at a random moment; SIGKILL while a checkpoint is being
written; SIGTERM; Ctrl-C; or a file system that takes no more bytes from a random moment on. Then it is started again
from its last whole checkpoint until it finishes. Its adapter must be the one of a run that was never interrupted.
"""

import argparse
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from models import lora_config
from training import echo_trainer
from transformers import TrainerCallback, logging

from echo_trainer.run.checkpoint_files import STAGING, checkpoints, damage

WAYS = ("SIGKILL", "SIGKILL in a save", "SIGTERM", "Ctrl-C", "disk full")
SETTINGS = {
    "max_steps": 8,
    "lr_scheduler_type": "constant",  # a step too many after the last would show
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_checkpointing": True,
}


class Beat(TrainerCallback):
    """Tells the parent, through a file, which step was finished."""

    def __init__(self, file: Path):
        self.file = file

    def on_step_end(self, args, state, control, **kwargs):
        self.file.write_text(str(state.global_step))


def train(folder: Path) -> None:
    """The run: from its last whole checkpoint where there is one."""
    lora = lora_config(lora_dropout=0.1, init_lora_weights=True)
    trainer = echo_trainer(folder, lora=lora, trainer_kwargs={"callbacks": [Beat(folder / "beat")]}, **SETTINGS)
    whole = any(damage(checkpoint) is None for checkpoint in checkpoints(folder))
    trainer.train(resume_from_checkpoint=True if whole else None)
    trainer.save_model()


def start(folder: Path) -> int:
    """Run `train` in a child; its process id."""
    folder.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
        with (folder / "log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            train(folder)
        status = 0
    except BaseException as error:
        with (folder / "log").open("a") as log:
            log.write(f"\n{type(error).__name__}: {error}\n")
    finally:
        os._exit(status)


def wait(child: int) -> int:
    """Wait for a child; 0 if it finished."""
    return os.waitpid(child, 0)[1]


def strike(child: int, folder: Path, way: str, moment: float, rng: random.Random) -> str:
    """End a run in one of the WAYS, about `moment` seconds from now; where the run was then."""
    if way == "SIGKILL in a save":
        saves = rng.randint(1, 3)
        while saves:
            if _ended(child):
                return "finished before"
            if (folder / STAGING).exists():
                saves -= 1
                while saves and (folder / STAGING).exists() and not _ended(child):
                    time.sleep(0.0005)
            time.sleep(0.0005)
        time.sleep(rng.random() * 0.03)
    else:
        deadline = time.monotonic() + moment
        while time.monotonic() < deadline and not _ended(child):
            time.sleep(0.002)
    if _ended(child):
        return "finished before"
    beat = (folder / "beat").read_text() if (folder / "beat").exists() else ""
    where = "in a save" if (folder / STAGING).exists() else "between two steps" if beat else "before the first step"
    if way == "disk full":
        bound = rng.choice([0, 500, 5_000, 20_000, 50_000, 100_000])
        resource.prlimit(child, resource.RLIMIT_FSIZE, (bound, bound))
    else:
        os.kill(child, {"SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}.get(way, signal.SIGKILL))
    return where


def _ended(child: int) -> bool:
    """Whether a child is a zombie, without collecting it."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100, help="runs to kill, each once to three times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="where to work (default: a temporary folder)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    root = args.folder or Path(tempfile.mkdtemp(prefix="kills-"))
    begin = time.monotonic()
    if wait(start(root / "whole")):
        print((root / "whole" / "log").read_text())
        return 1
    duration = time.monotonic() - begin
    expected = adapter_bytes(root / "whole")
    print(f"the run takes {duration:.1f} s; killing {args.runs} of them", flush=True)
    kills, killed_runs, equal, places = 0, 0, 0, Counter()
    rng = random.Random(args.seed)
    while killed_runs < args.runs:
        folder, deaths = root / "run", 0
        for _ in range(rng.choice([1, 1, 2, 3])):
            way = WAYS[(kills + deaths) % len(WAYS)]
            child, begun = start(folder), time.monotonic()
            where = strike(child, folder, way, rng.random() * duration, rng)
            if wait(child) == 0:
                duration = min(duration, time.monotonic() - begun)  # the first run had everything to warm up
                break
            if where == "finished before":
                print((folder / "log").read_text()[-3000:])
                print(f"{folder} failed of itself")
                return 1
            deaths += 1
            last = f"{way} {where}"
            places[last] += 1
            broken = [c.name for c in checkpoints(folder) if damage(c) is not None]
            if broken:
                print(f"{', '.join(broken)} of {folder} is damaged after {way} {where}")
                return 1
        same = wait(start(folder)) == 0 and adapter_bytes(folder) == expected
        if not same:
            print((folder / "log").read_text()[-3000:])
            print(f"after {way} {where} the final adapter of {folder} is not the one of the whole run")
            return 1
        if deaths:
            kills, killed_runs, equal = kills + deaths, killed_runs + 1, equal + same
            print(f"run {killed_runs}: {deaths} deaths, the last by {last}: bit-identical", flush=True)
        shutil.rmtree(folder)
    for place, count in sorted(places.items()):
        print(f"  {count:3} x {place}")
    seconds = time.monotonic() - begin
    print(f"{equal} of {killed_runs} killed runs ({kills} deaths) end bit-identical; {seconds:.0f} s")
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
