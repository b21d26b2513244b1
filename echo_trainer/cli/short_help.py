"""`echo-trainer sft --help`: purpose, examples and the options that most runs need, on one screen."""

import dataclasses
import shutil
from textwrap import shorten
from typing import Any

from ..config import EchoSFTConfig
from ..recipe.arguments import AdapterArguments, DataArguments

HEAD = """echo-trainer sft [--config RECIPE] [--OPTION VALUE ...]

Fine-tune a model with a LoRA adapter and an echo. RECIPE is a YAML file or the name of a shipped one
(`echo-trainer recipes`); options of the command line go before those of the recipe.

  echo-trainer sft --config smollm2-135m/openbookqa
  echo-trainer sft --config mine.yaml --learning_rate 2e-4 --output_dir runs/mine --dry-run
  echo-trainer sft --config mine.yaml --dataset_name faq.csv --prompt_column question --completion_column answer
"""

FOOT = """--dry-run: look at the run without training: examples, layers, steps, costs. Nothing is written.
All options, TRL's too: `echo-trainer sft --help-all`. The same names are the keys of a recipe."""

OPTIONS = {
    "data": "dataset_name prompt_column completion_column dataset_template dataset_test_split max_length packing "
            "assistant_only_loss",
    "adapter": "model_name_or_path lora_r lora_alpha lora_dropout lora_target_modules lora_layers use_dora "
               "load_in_4bit "
               "portable_adapter",
    "training": "output_dir overwrite_output_dir resume_from_checkpoint num_train_epochs max_steps learning_rate "
                "per_device_train_batch_size gradient_accumulation_steps bf16 eval_strategy save_steps logging_steps "
                "report_to seed push_to_hub",
}  # fmt: skip

_SAID = {  # where TRL's help says less, or much more, than fits a line
    "model_name_or_path": "The base: an id on the Hub or a folder.",
    "dataset_name": "A file (csv, json, jsonl, parquet, txt), a folder, or an id on the Hub.",
    "dataset_template": "Make prompts of question and answer: alpaca (text) or chat (messages).",
    "dataset_test_split": "Split whose loss is followed with eval_strategy.",
    "assistant_only_loss": "Learn the assistant's turns only.",
    "lora_target_modules": "Modules that get LoRA, by name.",
    "max_length": "Tokens of a row, longer ones are cut.",
    "packing": "Fill rows with several examples.",
    "load_in_4bit": "Quantise the base (QLoRA).",
    "output_dir": "Folder of checkpoints, adapter and card.",
    "resume_from_checkpoint": "true, or a folder: go on with an interrupted run.",
    "max_steps": "Optimizer steps; -1: by num_train_epochs.",
    "bf16": "bfloat16; on a CPU float32 is the default.",
    "eval_strategy": "no, steps or epoch.",
    "save_steps": "Steps between checkpoints.",
    "logging_steps": "Steps between log lines.",
    "report_to": "none, tensorboard, wandb or trackio.",
    "push_to_hub": "Push the finished adapter.",
    "gradient_accumulation_steps": "Batches of an optimizer step.",
    "per_device_train_batch_size": "Rows of a batch on each device.",
    "num_train_epochs": "Times that the data is gone through.",
    "learning_rate": "Of the adapter.",
    "seed": "Of initialisation, data order and, without echo_seed, routing.",
}


def short_help(width: int | None = None) -> str:
    """The text, `width` columns wide; None takes the terminal's."""
    classes = (DataArguments, EchoSFTConfig, AdapterArguments)
    echo = [f.name for cls in classes for f in dataclasses.fields(cls) if f.name.startswith("echo_")]
    groups = {"echo": echo, **{group: names.split() for group, names in OPTIONS.items()}}
    return on_a_screen(HEAD, groups, FOOT, classes, width)


def on_a_screen(
    head: str, groups: dict[str, list[str]], foot: str, classes: tuple[type, ...], width: int | None = None
) -> str:
    """
    Help with a line for each option.

    Args:
        head, foot: what stands before and after the options.
        groups: names of options under their headings.
        classes: the dataclasses that declare them.
        width: columns; None takes the terminal's.
    """
    width = width or shutil.get_terminal_size().columns
    declared = {f.name: f for cls in classes for f in dataclasses.fields(cls)}
    lines = [head]
    for group, names in groups.items():
        lines.append(f"{group}:")
        for name in names:
            start = f"  --{name:29}{default_of(declared[name]):11}"
            lines.append(
                start + shorten(first_sentence(declared[name]), max(width - len(start), 30), placeholder=" ...")
            )
    return "\n".join([*lines, "", foot])


def default_of(option: Any) -> str:
    """Default value of a field as one writes it; nothing where it is None."""
    made = option.default_factory is not dataclasses.MISSING
    value = option.default_factory() if made else option.default
    if value is None or value is dataclasses.MISSING:
        return ""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(getattr(value, "value", value))


def first_sentence(option: Any) -> str:
    """What an option does, in one sentence."""
    text = _SAID.get(option.name) or " ".join((option.metadata.get("help") or "").split())
    return text.split(". ")[0].rstrip(".") + "."
