"""Write `docs/options.md`: the echo's own options from their fields, TRL's from the table that the tests go through.

python tests/support/make_options.py
"""

import dataclasses
from typing import Any

from option_cases import SFT_OPTIONS, TRAINING_OPTIONS, Option
from paths import ROOT
from trl import SFTConfig

from echo_trainer.cli.short_help import default_of
from echo_trainer.config import EchoSFTConfig
from echo_trainer.options import PRESETS

PAGE = ROOT / "docs" / "options.md"
HEAD = """# Options

Made by `python tests/support/make_options.py`; a test compares this page with what the script writes.

`EchoSFTConfig` has all fields of `trl.SFTConfig` (so of `transformers.TrainingArguments`) and those of the first
table. All can stand in a recipe, on the command line (`echo-trainer sft --help-all`) and in Python.
"""
OURS = """
## The echo's own options

`echo_preset` fills the options whose default is said to be the preset's.

| option | default | meaning |
|---|---|---|
"""
THEIRS = """
## {title}

{text}

| option | value tried | here | |
|---|---|---|---|
"""
SFT = (
    "Every public field that `SFTConfig` of TRL 1.16 declares. Each row was set, to the value shown, in a run of "
    "`SFTTrainer` and in one of `EchoSFTTrainer` by a test (`tests/trainer/test_options.py`), those that go together "
    "in one run. *The same*: the first loss, learning rates, steps, names in the log and checkpoints agree."
)
TRAINING = (
    "The most used fields of `TrainingArguments`, tested alike. With the echo off every option is TRL's, bit for bit. "
    "FSDP and DeepSpeed: [Many processes](../recipes/accelerate/README.md)."
)


def render() -> str:
    """The page."""
    parts = [HEAD, OURS]
    base = {field.name for field in dataclasses.fields(SFTConfig)}
    parts += [_own(field) for field in dataclasses.fields(EchoSFTConfig) if field.name not in base]
    for title, text, options in (
        ("Options of `SFTConfig`", SFT, SFT_OPTIONS),
        ("Options of `TrainingArguments`", TRAINING, TRAINING_OPTIONS),
    ):
        parts.append(THEIRS.format(title=title, text=text))
        parts += [_theirs(option) for option in options]
    return "".join(parts)


def _own(field: Any) -> str:
    default = default_of(field)
    if field.name in PRESETS["paper"] and not default:
        default = f"the preset's ({PRESETS['paper'][field.name]})".lower()
    text = " ".join(field.metadata["help"].split()).replace("|", "\\|")
    return f"| `{field.name}` | {default or 'none'} | {text} |\n"


def _theirs(option: Option) -> str:
    value = repr(option.value)
    how = option.how.replace("|", "\\|")
    verdict = option.verdict if option.verdict == "the same" else f"**{option.verdict}**"
    return f"| `{option.name}` | `{value}` | {verdict} | {how} |\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
