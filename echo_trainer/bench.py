"""`echo-trainer bench`: what an echo step costs beside a step of plain LoRA in `trl.SFTTrainer`.

All variants share one set of frozen random weights and see the same batches, in interleaved rounds, so that whatever
else the machine does hits all of them alike. Ratios of medians are reported, and counted floating-point operations
beside them, which do not depend on the machine.
"""

import copy
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from .bench_tokenizer import placeholder_tokenizer
from .config import EchoSFTConfig
from .trainer import EchoSFTTrainer

SHAPES = {
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "llama-7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32000,
    },
    "llama3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512,
    },
}  # fmt: skip
BASELINE = "SFTTrainer LoRA"


@dataclass(frozen=True)
class BenchOptions:
    """
    One benchmark.

    Attributes:
        shape: name in `SHAPES`; weights are random.
        prompt, answer: tokens of the prompt and of the answer of every sample.
        batch: samples a step.
        rounds: measured steps of every variant, after `warmup` unmeasured ones.
        dtype: "float32" or "bfloat16" (weights in bfloat16, no autocast).
        checkpointing: gradient checkpointing.
        dora: DoRA in every variant, the baseline included.
        variants: names in `VARIANTS` to run; the baseline is always run.
    """

    shape: str = "smollm2-135m"
    prompt: int = 128
    answer: int = 8
    batch: int = 8
    rounds: int = 10
    warmup: int = 2
    dtype: str = "float32"
    checkpointing: bool = False
    dora: bool = False
    r: int = 16
    variants: tuple[str, ...] = ()


# name: (trainer, config, echo options)
VARIANTS: dict[str, tuple[type, type, dict[str, Any]]] = {
    BASELINE: (SFTTrainer, SFTConfig, {}),
    "echo off": (EchoSFTTrainer, EchoSFTConfig, {"echo_p_start": 0.0, "echo_p_end": 0.0}),
    "suffix, all routed": (EchoSFTTrainer, EchoSFTConfig, {"echo_p_start": 1.0, "echo_p_end": 1.0}),
    "suffix, p 1 to 0.2": (EchoSFTTrainer, EchoSFTConfig, {}),
    "full, all routed": (EchoSFTTrainer, EchoSFTConfig, {"echo_p_end": 1.0, "echo_pass": "full"}),
}


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
        of the device, or on a CPU of the whole process) and the ratios of all of them to the baseline.
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
    tokens = options.batch * (options.prompt + options.answer)
    rows = {
        name: {
            "median_s": statistics.median(times[name]),
            "mean_s": statistics.fmean(times[name]),
            "times_s": times[name],
            "tokens_per_s": tokens / statistics.median(times[name]),
            "flops": flops[name],
            "peak_memory": memory[name],
        }
        for name in times
    }
    for row in rows.values():
        # A run with falling p is a sum of unequal steps: its price is the ratio of means, not of medians.
        row["time_ratio"] = row["median_s"] / rows[BASELINE]["median_s"]
        row["mean_time_ratio"] = row["mean_s"] / rows[BASELINE]["mean_s"]
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


def _peak_alone(name: str, options: BenchOptions) -> int:
    """Peak resident memory in bytes of a process that runs three steps of one variant and nothing else."""
    code = (
        "import json, resource, sys; from echo_trainer.bench import run_alone; run_alone(*json.loads(sys.argv[1])); "
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


class Stepper:
    """Runs optimizer steps of one trainer by hand, with what the Trainer's loop does in a step."""

    def __init__(self, name: str, base: LlamaForCausalLM, options: BenchOptions, folder: str):
        trainer_class, config_class, echo = VARIANTS[name]
        # Frozen weights are shared between the variants: copying 7 billion of them five times fits no device.
        model = copy.deepcopy(base, {id(p): p for p in base.parameters()})
        self.rounds = options.rounds
        self.trainer = trainer_class(
            model=model,
            args=config_class(
                output_dir=folder,
                per_device_train_batch_size=options.batch,
                max_steps=options.rounds,
                max_length=None,
                bf16=False,
                gradient_checkpointing=options.checkpointing,
                use_cpu=not torch.cuda.is_available(),
                report_to="none",
                logging_steps=10**6,
                save_strategy="no",
                disable_tqdm=True,
                dataloader_pin_memory=False,
                **echo,
            ),
            train_dataset=_samples(options),
            processing_class=placeholder_tokenizer(),
            peft_config=LoraConfig(
                r=options.r, lora_alpha=2 * options.r, target_modules="all-linear", use_dora=options.dora
            ),
        )
        trainer = self.trainer
        if options.checkpointing:
            trainer.model.activation_checkpointing_enable()
        trainer.state.max_steps = options.rounds
        trainer.create_optimizer()
        self.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.current_gradient_accumulation_steps = 1
        self.examples = list(iter(trainer.get_train_dataloader()))

    def step(self, round_number: int) -> None:
        """One optimizer step on the round's batch; with the echo on, collation is part of it."""
        trainer = self.trainer
        trainer.state.global_step = round_number
        batch = iter([self.examples[round_number % len(self.examples)]])
        (inputs,), n_items = trainer.get_batch_samples(batch, 1, trainer.args.device)
        trainer.training_step(self.model, dict(inputs), n_items)
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        self.model.zero_grad()

    def timed_step(self, round_number: int, device: torch.device) -> tuple[float, int]:
        """Seconds and peak bytes of the device for one step."""
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        begin = time.perf_counter()
        self.step(round_number)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        if device.type != "cuda":
            return seconds, 0
        # The other variants lie on the device too; count this one's own weights and states and what its step adds.
        return seconds, self._resident() + torch.cuda.max_memory_allocated() - before

    def _resident(self) -> int:
        """Bytes of the model's weights and the optimizer's states."""
        states = (x for state in self.trainer.optimizer.state.values() for x in state.values() if torch.is_tensor(x))
        return sum(x.nbytes for x in (*self.trainer.model.parameters(), *states))

    def counted_step(self) -> int:
        """Floating-point operations of a step, the mean over the run's routing where it changes."""
        args = self.trainer.args
        constant = getattr(args, "echo_p_start", 0.0) == getattr(args, "echo_p_end", 0.0)
        rounds = 1 if constant else self.rounds
        with FlopCounterMode(display=False) as counter:
            for round_number in range(rounds):
                self.step(round_number)
        return counter.get_total_flops() // rounds


def _samples(options: BenchOptions) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    vocabulary = SHAPES[options.shape]["vocab_size"]
    rows = []
    for _ in range(2 * options.batch):
        ids = torch.randint(3, vocabulary, (options.prompt + options.answer,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * options.prompt + ids[options.prompt :]})
    return Dataset.from_list(rows)


def random_model(options: BenchOptions, device: torch.device) -> LlamaForCausalLM:
    """A Llama of the chosen shape with frozen random weights."""
    torch.manual_seed(0)
    length = options.prompt + options.answer
    config = LlamaConfig(**SHAPES[options.shape], max_position_embeddings=max(2048, length), pad_token_id=0)
    with device:
        model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, options.dtype))
    return model.requires_grad_(False)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measured FLOP/s of a large matrix product, the best of five."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        a @ b
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
