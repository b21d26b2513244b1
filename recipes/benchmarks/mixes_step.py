"""One trainer of mixes.py: a process that runs step after step, each when it is told to, with the code on its path.

It is given a `Case` as JSON and writes one line of JSON for each step. It keeps to what every version of the package
has, and to public methods of the Trainer, so that two versions can be measured side by side.
"""

import importlib
import json
import os
import sys
import tempfile
import time
import types
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from trl import SFTConfig, SFTTrainer

from echo_trainer import EchoSFTConfig, EchoSFTTrainer
from echo_trainer.bench.tokenizer import placeholder_tokenizer
from echo_trainer.quiet import quiet_libraries


@dataclass(frozen=True)
class Case:
    """
    What a process runs.

    Attributes:
        prompts, answers: tokens of every sample; all of them are one batch.
        packed: one after the other in one row, else padded rows.
        echo: options of the echo; None for plain LoRA in `SFTTrainer`.
        steps: 0 plans a batch and says what its echo pass runs; else so many steps run, the second one counted.
        checkpointing: gradient checkpointing.
    """

    prompts: list[int]
    answers: list[int]
    packed: bool
    echo: dict | None
    steps: int
    checkpointing: bool = True


def main() -> None:
    case = Case(**json.loads(sys.argv[1]))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what else is printed goes elsewhere
    with quiet_libraries(), tempfile.TemporaryDirectory() as folder:
        trainer = build(case, folder)
        Watch(trainer, case, lambda figures: print(json.dumps(figures), file=out, flush=True))
        trainer.train()


class Watch:
    """Waits for a line of input before every step, and says afterwards what the step took."""

    def __init__(self, trainer: SFTTrainer, case: Case, say):
        self.trainer, self.case, self.say = trainer, case, say
        self.take, self.train, self.number = trainer.get_batch_samples, trainer.training_step, 0
        self.figures: dict = {}
        trainer.get_batch_samples, trainer.training_step = self.get_batch_samples, self.training_step
        watch = self

        class AtTheEnd(TrainerCallback):
            def on_step_end(self, *args, **kwargs):
                watch.figures["cpu_s"] = time.process_time() - watch.begin
                watch.say(watch.figures)
                watch.number += 1

        trainer.add_callback(AtTheEnd())

    def get_batch_samples(self, *args):
        sys.stdin.readline()
        self.begin, self.figures = time.process_time(), {}
        batches, n_items = self.take(*args)
        if not self.case.steps:
            self.say(sizes(batches[0]["echo_plan"].layout))
            sys.exit()
        return batches, n_items

    def training_step(self, *args):
        if self.number != 1:
            return self.train(*args)
        counting = types.ModuleType("counting")  # the same way to count, whatever version is on the path
        counting.__path__ = [str(Path(__file__).parents[2] / "echo_trainer")]
        sys.modules["counting"] = counting
        counted = importlib.import_module("counting.bench.counted").CountedBytes()
        counter = importlib.import_module("counting.compat.flops").flop_counter()
        backward = self.trainer.accelerator.backward
        layer = [module for module in self.trainer.model.modules() if isinstance(module, LlamaDecoderLayer)][-1]
        run = 0

        def before_backward(*loss, **options):
            self.figures["saved_bytes"] = counted.held
            hook.remove()
            backward(*loss, **options)

        def note(module, args, kwargs):
            nonlocal run
            hidden = args[0] if args else kwargs["hidden_states"]
            run += hidden.numel() // hidden.shape[-1]

        hook = layer.register_forward_pre_hook(note, with_kwargs=True)
        self.trainer.accelerator.backward = before_backward
        with counter, counted:
            loss = self.train(*args)
        self.trainer.accelerator.backward = backward
        self.figures |= {"run": run, "flops": counter.get_total_flops(), "peak_bytes": counted.peak}
        return loss


def sizes(layout) -> dict[str, int]:
    """Tokens that a pass over suffixes runs, prefix tokens whose keys and values it keeps, and passes."""
    parts = getattr(layout, "parts", None) or (layout,)
    kept = sum((part.prefix_RP if hasattr(part, "prefix_RP") else part.prefix_n).numel() for part in parts)
    return {"run": sum(part.token_RA.numel() for part in parts), "kept": kept, "passes": len(parts)}


def build(case: Case, folder: str) -> SFTTrainer:
    """A trainer of a narrow Llama with the proportions of Llama 3's attention."""
    torch.manual_seed(0)
    longest = max(p + a for p, a in zip(case.prompts, case.answers, strict=True))
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=224, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=1, max_position_embeddings=max(2048, longest), pad_token_id=0,
    )  # fmt: skip
    trainer_class, config_class = (EchoSFTTrainer, EchoSFTConfig) if case.echo is not None else (SFTTrainer, SFTConfig)
    return trainer_class(
        model=LlamaForCausalLM(config),
        args=config_class(
            output_dir=folder,
            per_device_train_batch_size=len(case.prompts),
            max_steps=max(case.steps, 1),
            max_length=None,
            padding_free=case.packed,
            gradient_checkpointing=case.checkpointing,
            use_cpu=True,
            bf16=False,
            report_to="none",
            logging_steps=10**6,
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **(case.echo or {}),
        ),
        train_dataset=samples(case),
        processing_class=placeholder_tokenizer(),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    )


def samples(case: Case) -> Dataset:
    """Random tokens."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for prompt, answer in zip(case.prompts, case.answers, strict=True):
        ids = torch.randint(3, 250, (prompt + answer,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return Dataset.from_list(rows)


if __name__ == "__main__":
    main()
