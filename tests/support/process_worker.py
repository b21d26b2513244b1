"""What one of several processes does; started by `accelerate launch` from test_processes.py.

    accelerate launch --config_file CONFIG --num_processes N tests/support/process_worker.py OUTPUT CASE [CASE ...]

Each process writes OUTPUT/CASE/rank<r>.json; the main process also the adapter and the echo networks.
"""

import faulthandler
import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from models import lora_config, prompt_completion_rows, tiny_model
from peft import PeftModel
from poison import poison_a_micro_batch
from safetensors.torch import save_file
from training import echo_trainer
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from echo_trainer.compat.cache import PrefixCache
from echo_trainer.method import grouping
from echo_trainer.method.routing import RoutingSchedule
from echo_trainer.passes import echo, step
from echo_trainer.run.gathering import whole_state
from echo_trainer.run.pass_choice import PassChoice

DEADLINE = int(os.environ.get("ECHO_DEADLINE", "400"))  # seconds; more on a machine that others use as well
"""Seconds after which a process that hangs says where it does and ends."""

SHARED = {
    "gradient_checkpointing": True,
    "echo_p_start": 0.6,
    "echo_p_end": 0.6,
    "portable_adapter": False,
    "echo_aggregation": "weighted",
    "echo_source_layers": [3, 4],
    "echo_target_layers": [0, 1],
}


class Reader(TrainerCallback):
    """Notes every name of a parameter that a callback sees, by event."""

    seen: dict[str, set[str]] = {}

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def read(args, state, control, model=None, **kwargs):
            names = {key for key, _ in model.named_parameters()} | set(dict(model.named_modules()))
            self.seen[name] = self.seen.get(name, set()) | {key for key in names if "echo" in key}

        return read


def silent_rows(n: int, world: int) -> list[dict]:
    """Rows of which the second process of `world` gets, two at a time, only those in which nothing is predicted."""
    rows = []
    for i in range(n):
        ids = [2 + (7 * i + 3 * j) % 50 for j in range(8)]
        answered = (i // 2) % world != 1
        # A label on the first token alone: an answer that no token before it could predict, and no boundary.
        rows.append({"input_ids": ids, "labels": [-100] * 4 + ids[4:] if answered else ids[:1] + [-100] * 7})
    return rows


def even_rows(n: int) -> list[dict]:
    """Rows of one length, which accelerate can concatenate, with prompts of several lengths."""
    rows = []
    for i in range(n):
        ids = [2 + (5 * i + 3 * j) % 50 for j in range(10)]
        rows.append({"input_ids": ids, "labels": [-100] * (2 + i % 5) + ids[2 + i % 5 :]})
    return rows


def uneven_rows(n: int) -> list[dict]:
    """Prompts and answers of lengths that differ from row to row."""
    text = " ".join(f"w{i % 50}" for i in range(40)).split()
    return [
        {"prompt": " ".join(text[: 3 + 7 * i % 17]), "completion": " " + " ".join(text[: 2 + 5 * i % 11])}
        for i in range(n)
    ]


def settings_of(case: str, world: int, compared: int) -> dict:
    """Arguments of `training.echo_trainer` for a case, run by `world` processes, `compared` in the run it is for."""
    if case.startswith("strong"):  # an echo with its graph, whose gradient reaches the plain pass
        like = settings_of(case.removeprefix("strong-"), world, compared)
        return {**like, "echo_preset": "strong"}
    if case == "recomputed":  # as "parts"; one process keeps what it computes
        return {**settings_of("parts", world, compared), "echo_memory": "store" if world == 1 else "recompute"}
    if case in ("equal", "parts", "differs"):
        accumulation = 1 if world == 1 else 2
        return {
            **SHARED, "max_steps": 3, "optim": "sgd", "gradient_accumulation_steps": accumulation,
            # Of one row each nothing could be split into passes.
            "per_device_train_batch_size": (16 if case == "parts" and compared > 2 else 8) // accumulation // world,
            # What the processes must do when the rows of one of them prove that the suffix pass is not exact.
            **({"echo_pass": "full"} if case == "differs" and world == 1 else {}),
            **({"rows": uneven_rows(64 if compared > 2 else 40)} if case == "parts" else {}),
        }  # fmt: skip
    if case == "frozen":  # beside one process that runs all layers
        targets = ["q_proj", "v_proj", "down_proj"]
        return {
            **settings_of("equal", world, compared), "frozen_prefix_cache": world > 1, "echo_source_layers": [4],
            "echo_target_layers": [3], "max_steps": 12,
            "lora": lora_config(init_lora_weights=True, layers_to_transform=[3, 4], target_modules=targets),
        }  # fmt: skip
    if case == "read":  # as "equal", with readers of the model at every event and evaluations in between
        rows = Dataset.from_list(prompt_completion_rows(6, seed=5))
        return {
            **settings_of("equal", world, compared), "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True,
            "trainer_kwargs": {"eval_dataset": rows, "callbacks": [Reader()]},
        }  # fmt: skip
    if case == "judged":  # five held-out rows, two at a time: not as many for each process
        return {
            **SHARED, "max_steps": 4, "optim": "sgd", "per_device_train_batch_size": 8 // world,
            "per_device_eval_batch_size": 2, "echo_held_out": 5, "echo_probation": 2, "echo_when_useless": "stop",
            "echo_seed": 5,
        }  # fmt: skip
    if case in ("silent", "fading"):
        return {
            **SHARED, "max_steps": 4, "optim": "sgd", "per_device_train_batch_size": 2 * compared // world,
            "rows": silent_rows(8 * compared, compared), "train_sampling_strategy": "sequential", "echo_p_start": 1.0,
            "echo_p_end": 0.0 if case == "fading" else 1.0, "dataset_kwargs": {"skip_prepare_dataset": True},
        }  # fmt: skip
    if case == "stream":
        stream = Dataset.from_list(prompt_completion_rows(40)).to_iterable_dataset()
        return {
            **SHARED, "max_steps": 3, "optim": "sgd", "per_device_train_batch_size": 8 // world, "rows": stream,
        }  # fmt: skip
    if case == "dispatched":
        stream = Dataset.from_list(even_rows(40)).to_iterable_dataset()
        return {
            **SHARED, "max_steps": 3, "optim": "sgd", "per_device_train_batch_size": 8 // world, "rows": stream,
            "dataset_kwargs": {"skip_prepare_dataset": True}, "accelerator_config": {"dispatch_batches": True},
        }  # fmt: skip
    if case == "poisoned":
        return {
            **SHARED, "max_steps": 3, "optim": "sgd", "gradient_accumulation_steps": 2, "echo_p_start": 1.0,
            "echo_p_end": 1.0, "per_device_train_batch_size": 4 // world,
        }  # fmt: skip
    if case == "uneven":
        return {
            **SHARED, "max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2, "rows": prompt_completion_rows(4 * world + 3),
        }  # fmt: skip
    return {  # whole, resumed
        **SHARED, "max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "lora": lora_config(init_lora_weights=True, lora_dropout=0.1), "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip


def build(case: str, folder: Path, world: int, compared: int, **more):
    """A trainer whose echo networks change the outputs from the first step on."""
    unset_hf_deepspeed_config()  # of the case before; under ZeRO-3 the model would be initialised in another way
    torch.manual_seed(0)
    trainer = echo_trainer(folder, model=tiny_model(), **{**settings_of(case, world, compared), **more})
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trainer.echo_networks.named_parameters():
        if name.endswith("project_out"):
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.device)
    if case == "poisoned" and trainer.args.process_index == world - 1:
        poison_a_micro_batch(trainer, number=0)
    return trainer


def run(case: str, output: Path, world: int, compared: int | None = None, **more) -> dict:
    """Train a case and write its adapter and echo networks; what this process saw."""
    folder = output / case
    seen = {"routes": {}, "echo_passes": 0, "saves": 0, "parts": []}
    undo = _watch(seen)
    if case in ("parts", "recomputed"):
        undo = _make_passes_free(undo)
    if case == "differs" and world > 1 and int(os.environ["RANK"]) == world - 1:
        undo = _disturb(undo)
    try:
        trainer = build(case, folder, world, compared or world, **more)
        resume = (
            str(output / case.replace("resumed", "whole") / "checkpoint-2") if case.startswith("resumed") else None
        )
        trainer.train(resume_from_checkpoint=resume)
        seen["lockstep"] = trainer.pass_choice.one_form
        seen["probation"] = trainer.probation.record()
        seen["forms"] = [str(verdict.form) for verdict in trainer.pass_choice.verdicts.values()]
        seen["against"] = [verdict.against for verdict in trainer.pass_choice.verdicts.values()]
        saves = seen["saves"]
        trainer.save_model(folder / "final")
        seen["saves"] -= saves
        networks = whole_state(trainer.echo_networks)
        seen["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        seen["gradient_norms"] = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
        seen["nonfinite"] = [entry.get("echo/nonfinite", 0) for entry in trainer.state.log_history if "loss" in entry]
        seen["tokens"] = [entry["num_tokens"] for entry in trainer.state.log_history if "loss" in entry]
        seen["steps"] = trainer.state.global_step
        seen["read"] = {event: sorted(names) for event, names in Reader.seen.items()}
        rank = trainer.args.process_index
        if rank == 0:
            save_file(networks, folder / "echo.safetensors")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank{rank}.json").write_text(json.dumps(seen))
        trainer.accelerator.wait_for_everyone()
    finally:
        undo()
    return seen


def _watch(seen: dict):
    """Count draws, echo passes and saves; returns a function that stops it."""
    draw, run_echo_pass, save = RoutingSchedule.draw, echo.run_echo_pass, PeftModel.save_pretrained
    lay_out = PassChoice.plans

    def drawn(self, step, micro_batch, rows, documents):
        routed = draw(self, step, micro_batch, rows, documents)
        positions = self.position(step, micro_batch, rows).tolist()
        seen["routes"] |= dict(zip(map(str, positions), routed.tolist(), strict=True))
        return routed

    def counted(*args, **kwargs):
        seen["echo_passes"] += 1
        return run_echo_pass(*args, **kwargs)

    def laid_out(self, drafts):
        plans = lay_out(self, drafts)
        seen["parts"] += [plan.n_parts for plan in plans]
        return plans

    def saved(*args, **kwargs):
        seen["saves"] += 1
        return save(*args, **kwargs)

    RoutingSchedule.draw, step.run_echo_pass, PeftModel.save_pretrained = drawn, counted, saved
    PassChoice.plans = laid_out

    def undo():
        RoutingSchedule.draw, step.run_echo_pass, PeftModel.save_pretrained = draw, run_echo_pass, save
        PassChoice.plans = lay_out

    return undo


def _make_passes_free(undo):
    """Split suffixes into as many passes as they have lengths; returns a function that undoes it, too."""
    price, grouping.PASS = grouping.PASS, 0

    def both():
        undo()
        grouping.PASS = price

    return both


def _disturb(undo):
    """Make what the suffix pass reads wrong in this process; returns a function that undoes it, too."""
    update = PrefixCache.update

    def wrong(self, *args, **kwargs):
        keys, values = update(self, *args, **kwargs)
        return keys, values * 1.01

    PrefixCache.update = wrong

    def both():
        undo()
        PrefixCache.update = update

    return both


def pretend_accelerators() -> None:
    """
    Let accelerate take CPU processes for accelerators.

    It offers FSDP and DeepSpeed on accelerators only, though both run on a CPU. From here on all is its own code.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled; gloo does


def main(output: str, cases: list[str]) -> None:
    faulthandler.dump_traceback_later(DEADLINE, exit=True)
    sharded = any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))
    if sharded and not torch.cuda.is_available():
        pretend_accelerators()
    more = {"use_cpu": not sharded and not torch.cuda.is_available()}
    for case in cases:
        if case.endswith("sharded"):
            os.environ["FSDP_STATE_DICT_TYPE"] = "SHARDED_STATE_DICT"
        run(case, Path(output), int(os.environ["WORLD_SIZE"]), **more)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
