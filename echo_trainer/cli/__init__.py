"""`echo-trainer`: a thin door to the package's functions. `echo-trainer COMMAND --help` explains each."""

import argparse
import importlib
import os
import sys
import traceback
import warnings

from ..recipe.find import available_recipes
from ..recipe.read import named_recipe

_COMMANDS = {
    "quickstart": ("..quickstart", "fine-tune the embedded base with LoRA and with Echo-LoRA, offline, in minutes"),
    "sft": (".sft", "fine-tune a model from a recipe or from options"),
    "evaluate": (".evaluate", "measure a model or an adapter: commonsense tasks, GSM8K, or your own prompts"),
    "bgrpo": (".bgrpo", "train on beams that a verifier judges, rewarded by rank (beam GRPO)"),
    "distill": (".distill", "have the echo of a run answer prompts, and train its adapter on the answers as well"),
    "bench": (".bench", "measure what an echo step costs beside plain LoRA"),
    "select-layers": (".select_layers", "choose the layers worth adapting, by CKA on your model and data"),
    "check": (".serving", "say whether serving engines will serve an adapter as it was trained"),
    "export": (".serving", "write an adapter in another form: portable, merged, LoRA from DoRA, GGUF"),
    "push": (".push", "push a finished run to the Hub, and compare every checksum"),
    "ablate": (".ablate", "measure which part of Echo-LoRA makes a difference: arms x seeds, paired"),
    "recipes": ("..recipe.find", "list the recipes that ship with the package"),
    "env": (".env", "print versions, device and kernels: the first thing to paste into a report"),
}

_TAKE_RECIPES = ("sft", "select-layers", "distill", "bgrpo")

PASSING_WARNINGS = (
    r"`(is_)?gradient_checkpointing` is deprecated",  # TRL's default, under its older name
    r"'pin_memory' argument is set as true but no accelerator",
)
"""Beginnings of what other libraries say of each other, and a user of the command line can do nothing about."""

_USAGE = """usage: echo-trainer COMMAND [options]

Echo-LoRA: fine-tune a language model for nearly the price of plain LoRA, and measure whether it helps.

commands:
{commands}

`echo-trainer COMMAND --help` explains a command. ECHO_TRAINER_TRACEBACK=1 shows where an error comes from.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 failed, 2 bad input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from .._version import __version__

        print(f"echo-trainer {__version__}")
        return 0
    for passing in PASSING_WARNINGS:
        warnings.filterwarnings("ignore", message=passing)
    name, *rest = arguments
    if name not in _COMMANDS:
        print(f"echo-trainer: {name!r} is no command.\n\n{usage()}", file=sys.stderr)
        return 2
    if name == "recipes":
        return list_recipes()
    try:
        if name in ("check", "export"):
            return serving_command(name, rest)
        if name in _TAKE_RECIPES:  # a wrong name and broken YAML are said before torch is loaded
            named_recipe(rest)
        return importlib.import_module(_COMMANDS[name][0], __name__).main(rest)
    except KeyboardInterrupt:
        print(
            f"\necho-trainer {name}: interrupted. What was finished is kept: the same command goes on from there "
            f"(sft, bgrpo: with --resume_from_checkpoint true).",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:  # whoever read the output (`| head`) has seen enough
        sys.stdout = None
        return 1
    except (ValueError, TypeError, OSError, ArithmeticError, MemoryError, RuntimeError) as error:
        return _say(name, error)


def _say(name: str, error: Exception) -> int:
    """Print an error in plain words; errors that only a programmer can read come with their traceback."""
    plain = isinstance(error, ValueError | FileNotFoundError | TypeError)
    ours = plain or type(error).__module__.startswith("echo_trainer.") or getattr(error, "__notes__", None)
    if os.environ.get("ECHO_TRAINER_TRACEBACK") or not (ours or isinstance(error, OSError)):
        traceback.print_exc()
    print("\n".join([f"\necho-trainer {name}: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr)
    return 2 if plain else 1


def usage() -> str:
    """The text of `echo-trainer --help`."""
    width = max(map(len, _COMMANDS))
    return _USAGE.format(commands="\n".join(f"  {name:{width}}  {what}" for name, (_, what) in _COMMANDS.items()))


def serving_command(name: str, arguments: list[str]) -> int:
    """Run `check` or `export`."""
    from .serving import add_check_parser, add_export_parser

    parser = argparse.ArgumentParser(prog="echo-trainer")
    subparsers = parser.add_subparsers()
    add_check_parser(subparsers)
    add_export_parser(subparsers)
    parsed = parser.parse_args([name, *arguments])
    return parsed.func(parsed)


def list_recipes() -> int:
    """Print the names of the shipped recipes."""
    print("\n".join(available_recipes()))
    return 0
