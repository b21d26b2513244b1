"""What `echo-trainer bench` measures: one variant of a training step on a model of random weights."""

import copy
import gc
import time
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from ..compat.building import random_model as made_at_random
from ..compat.flops import flop_counter
from ..config import EchoSFTConfig
from ..run.answers import PLAN_KEY
from ..trainer import EchoSFTTrainer
from .counted import CountedBytes
from .lengths import lengths_of
from .tokenizer import placeholder_tokenizer

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
        prompt, answer: tokens of the prompt and of the answer of every sample, as `lengths` says.
        lengths: how they differ from sample to sample (`lengths.lengths_of`); None for not at all.
        packed: put the samples of a step one after the other, without padding.
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
    lengths: str | None = None
    packed: bool = False
    variants: tuple[str, ...] = ()


# name: (trainer, config, echo options)
VARIANTS: dict[str, tuple[type, type, dict[str, Any]]] = {
    BASELINE: (SFTTrainer, SFTConfig, {}),
    "echo off": (EchoSFTTrainer, EchoSFTConfig, {"echo_p_start": 0.0, "echo_p_end": 0.0}),
    "suffix, all routed": (EchoSFTTrainer, EchoSFTConfig, {"echo_p_end": 1.0, "echo_pass": "suffix"}),
    "suffix, stored": (
        EchoSFTTrainer,
        EchoSFTConfig,
        {"echo_p_end": 1.0, "echo_pass": "suffix", "echo_memory": "store"},
    ),
    "suffix, recomputed": (
        EchoSFTTrainer,
        EchoSFTConfig,
        {"echo_p_end": 1.0, "echo_pass": "suffix", "echo_memory": "recompute"},
    ),
    "suffix, p 1 to 0.2": (EchoSFTTrainer, EchoSFTConfig, {"echo_pass": "suffix"}),
    "full, all routed": (EchoSFTTrainer, EchoSFTConfig, {"echo_p_end": 1.0, "echo_pass": "full"}),
}


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
                train_sampling_strategy="sequential",
                padding_free=options.packed,
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
        trainer.state.max_steps, trainer.state.train_batch_size = options.rounds, options.batch
        trainer.create_optimizer()
        if isinstance(trainer, EchoSFTTrainer):  # as when training begins
            trainer.guard.begin()
            trainer.probation.begin()
            trainer.attachment.put_on()
        self.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.model_wrapped = self.model
        trainer.current_gradient_accumulation_steps = 1
        self.examples = list(iter(trainer.get_train_dataloader()))

    def ran(self) -> str | None:
        """The pass that ran in the echo steps so far: "suffix" or "full"; None where there is no echo."""
        choice = getattr(self.trainer, "pass_choice", None)
        forms = {"suffix" if v.form.runs_suffixes else str(v.form) for v in choice.verdicts.values()} if choice else ()
        return " and ".join(sorted(forms)) or None

    def step(self, round_number: int) -> None:
        """One optimizer step on the round's batch; with the echo on, collation is part of it."""
        trainer = self.trainer
        trainer.state.global_step = round_number
        batch = iter([self.examples[round_number % len(self.examples)]])
        (inputs,), n_items = trainer.get_batch_samples(batch, 1, trainer.args.device)
        self.tokens = tokens_run(inputs)
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
        with flop_counter() as counter:
            for round_number in range(rounds):
                self.step(round_number)
        return counter.get_total_flops() // rounds

    def counted_bytes(self) -> tuple[int, int]:
        """Bytes held between forward and backward of the first step, and at most at a time."""
        accelerator, held = self.trainer.accelerator, []
        backward = accelerator.backward

        def looked_at(*args: Any, **kwargs: Any) -> None:
            held.append(counted.held)
            backward(*args, **kwargs)

        accelerator.backward = looked_at
        try:
            with CountedBytes() as counted:
                self.step(0)
        finally:
            accelerator.backward = backward
        return held[0], counted.peak


@dataclass(frozen=True)
class Tokens:
    """
    Tokens of a batch and of its echo pass.

    Attributes:
        batch, real: of the batch, with and without padding.
        run, run_real: of the echo pass, likewise; 0 where none ran.
        parts: passes over suffixes, 0 where the pass is none of suffixes.
    """

    batch: int
    real: int
    run: int = 0
    run_real: int = 0
    parts: int = 0


def tokens_run(inputs: dict[str, Any]) -> Tokens:
    """What a step runs; `inputs` with the plan of its echo pass where there is one."""
    ids, mask, plan = inputs["input_ids"], inputs.get("attention_mask"), inputs.get(PLAN_KEY)
    real = ids.numel() if mask is None else int(mask.sum())
    if plan is None or plan.layout is None:
        return Tokens(ids.numel(), real)
    work = plan.layout.work(ids.shape, mask)
    return Tokens(ids.numel(), real, work.tokens, work.real, plan.n_parts)


def _samples(options: BenchOptions) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    vocabulary = SHAPES[options.shape]["vocab_size"]
    rows = []
    for prompt, answer in lengths_of(options.lengths, options.prompt, options.answer, 2 * options.batch):
        ids = torch.randint(3, vocabulary, (prompt + answer,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return Dataset.from_list(rows)


def random_model(options: BenchOptions, device: torch.device) -> LlamaForCausalLM:
    """A Llama of the chosen shape with frozen random weights."""
    torch.manual_seed(0)
    length = max(map(sum, lengths_of(options.lengths, options.prompt, options.answer, 2 * options.batch)))
    config = LlamaConfig(**SHAPES[options.shape], max_position_embeddings=max(2048, length), pad_token_id=0)
    model = made_at_random(LlamaForCausalLM, config, device, getattr(torch, options.dtype))
    return model.requires_grad_(False)
