"""What one of two processes does when something fails in one of them; started by `accelerate launch`.

    accelerate launch --config_file CONFIG --num_processes 2 tests/support/fault_worker.py OUTPUT CASE [CASE ...]

A case breaks one thing on one process. Each process writes OUTPUT/rank<r>.json: by case what was raised there, or what
it saw. The processes are the same for all cases, so each case also shows that the one before left them in step.
"""

import copy
import errno
import faulthandler
import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import process_worker
import torch
from models import tiny_model
from torch.distributed.fsdp import fully_shard

from echo_trainer.hub.client import PushError
from echo_trainer.run import agreement, checkpoint_files, checkpoints, echo_weights, pushes, resume, save
from echo_trainer.run.resume import base_fingerprint
from echo_trainer.selection import use
from echo_trainer.selection.select import select_layers

DEADLINE = 240
"""Seconds after which a process that hangs says where it does and ends."""

FULL = OSError(errno.ENOSPC, "No space left on device")
BROKEN = OSError(errno.EIO, "Input/output error")
DENIED = PermissionError(errno.EACCES, "Permission denied", "echo_checkpoint.json")

Run = Callable[[Path], object]
CASES: dict[str, Run] = {}


def case(run: Run) -> Run:
    CASES[run.__name__] = run
    return run


def rank() -> int:
    return torch.distributed.get_rank()


@contextmanager
def failing(owner: object, name: str, error: Exception, on: int = 0):
    """A function that raises on one process."""
    own = getattr(owner, name)

    def fail(*args, **kwargs):
        raise copy.copy(error)

    setattr(owner, name, fail if rank() == on else own)
    try:
        yield
    finally:
        setattr(owner, name, own)


def trainer_for(folder: Path, **more):
    return process_worker.build("whole", folder, 2, 2, **OPTIONS, **{"max_steps": 2, **more})


def train(folder: Path, owner: object, name: str, error: Exception, on: int = 0) -> None:
    """Train to the first checkpoint."""
    trainer = trainer_for(folder)
    with failing(owner, name, error, on):
        trainer.train()


@case
def manifest(folder: Path) -> None:
    train(folder, checkpoints, "write_manifest", BROKEN)


@case
def publishing(folder: Path) -> None:
    train(folder, checkpoints, "publish", FULL)


@case
def rotating(folder: Path) -> None:
    train(folder, checkpoints, "rotate", BROKEN)


@case
def staging(folder: Path) -> None:
    train(folder, checkpoints.os, "makedirs", FULL)


@case
def echo_networks(folder: Path) -> None:
    train(folder, echo_weights, "save_file", FULL)


@case
def adapter(folder: Path) -> None:
    train(folder, save, "drop_pickle", BROKEN)


@case
def card(folder: Path) -> None:
    train(folder, save, "publish_files", BROKEN)


@case
def random_state_of_the_second(folder: Path) -> None:
    """What the other process writes alone."""
    write = torch.save

    def fail(value, path, *args, **kwargs):
        if "rng_state" in str(path):
            raise copy.copy(BROKEN)
        write(value, path, *args, **kwargs)

    trainer = trainer_for(folder)
    torch.save = fail if rank() == 1 else write
    try:
        trainer.train()
    finally:
        torch.save = write


def with_checkpoint(folder: Path):
    """A trainer beside a checkpoint."""
    trainer_for(folder).train()
    return trainer_for(folder, max_steps=4)


@case
def key_while_resuming(folder: Path) -> None:
    trainer = with_checkpoint(folder)
    with failing(resume, "read_manifest", KeyError("adapter")):
        trainer.train(resume_from_checkpoint=True)


@case
def permission_while_resuming(folder: Path) -> None:
    trainer = with_checkpoint(folder)
    with failing(resume, "damage", DENIED):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))


@case
def adapter_while_resuming(folder: Path) -> None:
    trainer = with_checkpoint(folder)
    with failing(echo_weights, "safe_open", DENIED, on=1):
        trainer.train(resume_from_checkpoint=True)


@case
def best(folder: Path) -> None:
    trainer = trainer_for(folder)
    trainer.train()
    trainer.state.best_model_checkpoint = str(folder / "checkpoint-2")
    with failing(checkpoints, "damage", DENIED):
        trainer.checkpoints.load_best(lambda: None)


@case
def not_finite(folder: Path) -> None:
    """NaN in what the main process is about to save."""
    trainer = trainer_for(folder, save_strategy="no")
    trainer.train()
    tensors = save.trained_tensors

    def poisoned(*args):
        found = tensors(*args)
        next(iter(found["default"].values())).fill_(float("nan"))
        return found

    save.trained_tensors = poisoned if rank() == 0 else tensors
    try:
        trainer.save_model(folder / "final")
    finally:
        save.trained_tensors = tensors


@case
def pushing(folder: Path) -> None:
    trainer = trainer_for(folder, save_strategy="no", hub_model_id="ada/one")
    with failing(pushes, "copy_run", BROKEN):
        trainer.push_to_hub()


@case
def pushing_a_checkpoint(folder: Path) -> None:
    trainer = trainer_for(folder)
    with failing(pushes.Pushes, "_checkpoint_push", BROKEN):
        trainer.pushes.checkpoint(str(folder))


@case
def pushing_after_training(folder: Path) -> str:
    """A failed push at the end does not cost the training, on any process."""
    trainer = trainer_for(folder, save_strategy="no", hub_model_id="ada/one")
    trainer.args.push_to_hub, trainer.args.hub_strategy = True, "end"
    with failing(pushes, "copy_run", PushError("no")):
        trainer.pushes.after_training()
    return "went on"


@case
def selection(folder: Path) -> None:
    with failing(use, "select_layers", DENIED):
        trainer_for(folder, echo_source_layers="cka", echo_target_layers="cka")


@case
def selection_that_differs(folder: Path) -> list:
    """Each process would choose other layers."""
    echo_layers = use.echo_layers
    use.echo_layers = lambda *args, **kwargs: ([4], [rank()])
    try:
        trainer = trainer_for(folder, echo_source_layers="cka", echo_target_layers="cka")
    finally:
        use.echo_layers = echo_layers
    return [trainer.echo.source_layers, sorted({site.layer for site in trainer.echo.sites})]


@case
def another_place(folder: Path) -> None:
    """The main process fails where the other is held up, and does not wait for it for ever."""
    patience, agreement.PATIENCE = agreement.PATIENCE, agreement.timedelta(seconds=1)
    talks = agreement.Agreement()
    gone = folder.parent / "gone"
    talks.gather(rank())  # connected: the end of one process is then seen by the other
    try:
        with talks.together():
            if rank() == 0:
                raise copy.copy(BROKEN)
            while not gone.exists():
                pass
    finally:
        agreement.PATIENCE = patience
        gone.touch()


def sharded() -> torch.nn.Module:
    """A frozen model in shards, as transformers makes one while it loads it."""
    model = tiny_model().requires_grad_(False)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


@case
def fingerprint(folder: Path) -> list:
    """Of a base in shards and of the same base whole."""
    return [base_fingerprint(model) for model in (sharded(), tiny_model().requires_grad_(False))]


@case
def selection_in_shards(folder: Path) -> None:
    select_layers(sharded(), [{"input_ids": [2, 3, 4]}] * 8)


@case
def own_disks(folder: Path) -> dict:
    """Checkpoints in shards, where each process has a disk of its own (another working directory)."""
    os.environ["FSDP_STATE_DICT_TYPE"] = "SHARDED_STATE_DICT"
    trainer = trainer_for(folder, max_steps=3, save_steps=1, save_total_limit=2)
    trainer.train()
    whole = {path.name: checkpoint_files.damage(path) for path in checkpoint_files.checkpoints(folder)}
    there = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    return {"whole": whole, "files": there, "hidden": [path.name for path in folder.glob(".*")]}


@case
def own_part_is_damaged(folder: Path) -> None:
    """After the case above."""
    folder = folder.with_name("own_disks")
    if rank() == 1:
        next((folder / "checkpoint-3").glob("*/*.distcp")).write_bytes(b"")
    trainer_for(folder, max_steps=4).train(resume_from_checkpoint=True)


@case
def own_part_is_gone(folder: Path) -> None:
    """After the case above."""
    folder = folder.with_name("own_disks")
    if rank() == 1:
        shutil.rmtree(folder / "checkpoint-3")
    trainer_for(folder, max_steps=4).train(resume_from_checkpoint=True)


def run(name: str, output: Path) -> dict:
    try:
        return {"result": CASES[name](output / name)}
    except Exception as error:
        told = {"kind": type(error).__name__, "error": str(error), "notes": getattr(error, "__notes__", [])}
        return told | {"left": sorted(path.name for path in (output / name).glob(f"{checkpoint_files.STAGING}*"))}


def main(output: str, names: list[str]) -> None:
    faulthandler.dump_traceback_later(DEADLINE, exit=True)
    fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if fsdp:
        process_worker.pretend_accelerators()
    OPTIONS["use_cpu"] = not fsdp
    trainer_for(Path(output, "first"))  # the process group
    seen = {}
    for name in names:
        seen[name] = run(name, Path(output))
        Path(output, f"rank{rank()}.json").write_text(json.dumps(seen))
    os._exit(0) if "another_place" in names else torch.distributed.destroy_process_group()


OPTIONS: dict[str, object] = {}

if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
