"""What a step waits for before it can begin: fetching, collating, drawing routes and planning a batch of packed rows.

    python recipes/benchmarks/data_cost.py [--rows 16] [--length 8192] [--workers 0 2] [--steps 12]

A tiny model, no training and no downloads; documents have log-normal lengths, a third of each is its answer. The
figures are the time of the main process between two steps (`get_batch_samples`): by the clock, and what its thread
computes of it, which does not depend on what else the machine does. A worker has `--step-time` seconds for each batch,
as it has while a device computes.
"""

import argparse
import importlib
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from echo_trainer import EchoSFTConfig, EchoSFTTrainer, quiet
from echo_trainer.bench.tokenizer import placeholder_tokenizer
from echo_trainer.quiet import quiet_libraries

# Also runs with the code of before, beside which it is measured (mixes.py).
PLANNED_IN = "echo_trainer.run.draft" if (Path(quiet.__file__).parent / "run").is_dir() else "echo_trainer.collator"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--step-time", type=float, default=1.0, help="seconds between two batches, with workers")
    parser.add_argument("--pass", dest="form", default="suffix", choices=("suffix", "full"))
    options = parser.parse_args()
    with quiet_libraries():
        for workers in options.workers:
            print(json.dumps({"workers": workers, **measure(options, workers)}))


def measure(options: argparse.Namespace, workers: int) -> dict[str, float]:
    """Median milliseconds in the main process for one micro-batch, and what the batch is."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(options, workers, folder)
        if hasattr(trainer, "pass_choice"):  # what the proof costs is measured by proof_cost.py
            trainer.pass_choice.settle = lambda *args: None
        planning, plan_s = importlib.import_module(PLANNED_IN), []
        make_plan = planning.make_plan

        def timed_plan(*args, **kwargs):
            begin = time.thread_time()
            plan = make_plan(*args, **kwargs)
            plan_s.append(time.thread_time() - begin)
            return plan

        planning.make_plan = timed_plan
        trainer.state.max_steps, trainer.state.train_batch_size = 100, options.rows
        batches = iter(trainer.get_train_dataloader())
        seconds = []
        for step in range(options.steps):
            trainer.state.global_step = step
            if workers:
                time.sleep(options.step_time)
            begin, own = time.perf_counter(), time.thread_time()
            (inputs,), _ = trainer.get_batch_samples(batches, 1, trainer.args.device)
            seconds.append((time.perf_counter() - begin, time.thread_time() - own))
    plan = inputs["echo_plan"]
    return {
        "wall_ms": 1000 * statistics.median(wall for wall, _ in seconds[2:]),
        "thread_ms": 1000 * statistics.median(own for _, own in seconds[2:]),
        "plan_ms": 1000 * statistics.median(plan_s[2:]),
        "tokens": inputs["input_ids"].numel(),
        "documents": plan.n_samples,
        "predicted": len(plan.labels_N),
    }


def build(options: argparse.Namespace, workers: int, folder: str) -> EchoSFTTrainer:
    """A trainer on packed rows."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2, pad_token_id=0
    )
    return EchoSFTTrainer(
        model=LlamaForCausalLM(config),
        args=EchoSFTConfig(
            output_dir=folder,
            per_device_train_batch_size=options.rows,
            max_steps=100,
            max_length=options.length,
            packing=True,
            dataloader_num_workers=workers,
            dataloader_pin_memory=False,
            echo_pass=options.form,
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=documents(options),
        processing_class=placeholder_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )


def documents(options: argparse.Namespace) -> Dataset:
    """Enough documents for every step."""
    generator = torch.Generator().manual_seed(0)
    tokens, rows = options.rows * options.length * (options.steps + 2), []
    while tokens > 0:
        length = min(options.length, max(8, int(torch.empty(()).log_normal_(4.5, 1.0, generator=generator))))
        ids = torch.randint(3, 60, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (2 * length // 3) + ids[2 * length // 3 :]})
        tokens -= length
    return Dataset.from_list(rows)


if __name__ == "__main__":
    main()
