"""The table of wrong inputs, part 2: checkpoint folders, adapters on disk, recipes and the command line."""

import contextlib
import functools
import io
import json
import shutil
import tempfile
from pathlib import Path

from bad_inputs import BadInput
from models import tiny_model
from training import echo_trainer

from echo_trainer import cli
from echo_trainer.resources import QUICKSTART_BASE
from echo_trainer.run.checkpoint_files import checkpoints

CHECKPOINTS, ADAPTERS, RECIPES, COMMANDS = "Resuming", "Adapters on disk", "Recipes", "Command line"


class CommandError(Exception):
    """What a command printed before it ended with status 1 or 2."""


def command(*arguments):
    """Run a command; what it says on failure as an exception."""
    text = io.StringIO()
    with contextlib.redirect_stderr(text), contextlib.redirect_stdout(text):
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
    lines = [line for line in text.getvalue().splitlines() if not line.startswith(("usage:", "  warn"))]
    if status in (1, 2):
        raise CommandError("\n".join(line for line in lines if "Warning" not in line).strip())


@functools.cache
def finished_run():
    """A run with two checkpoints and its final adapter, made once."""
    folder = Path(tempfile.mkdtemp(prefix="bad-inputs-"))
    trainer = echo_trainer(folder, max_steps=4, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    return folder


def resume(harm=lambda out: None, checkpoint=True, **settings):
    """Resume from a copy of the finished run that was harmed."""

    def give(folder):
        shutil.copytree(finished_run(), folder / "out", dirs_exist_ok=True)
        harm(folder / "out")
        made = {name: value() if callable(value) else value for name, value in settings.items()}
        trainer = echo_trainer(folder / "out", max_steps=4, **made)
        trainer.train(resume_from_checkpoint=checkpoint if checkpoint is True else str(folder / "out" / checkpoint))

    return give


def cut(name, all_of_them=False):
    """Take the last byte from a file of the last checkpoint, or of all."""

    def harm(out):
        for checkpoint in checkpoints(out)[: None if all_of_them else 1]:
            path = checkpoint / name
            path.write_bytes(path.read_bytes()[:-1])

    return harm


def without(name):
    def harm(out):
        for checkpoint in checkpoints(out):
            shutil.rmtree(checkpoint) if name is None else (checkpoint / name).unlink()

    return harm


def adapter_command(verb, *rest, harm=lambda adapter: None):
    """Run a command on a copy of the finished adapter that was harmed."""

    def give(folder):
        adapter = folder / "adapter"
        shutil.copytree(finished_run(), adapter)
        harm(adapter)
        # relative, since a path of any length would be wrapped into the table that `check` prints
        command(verb, "adapter", *(part(folder) if callable(part) else part for part in rest))

    return give


def edit_config(**changes):
    def harm(adapter):
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return harm


def overwrite(name, content):
    return lambda adapter: (adapter / name).write_text(content)


def remove(name):
    return lambda adapter: (adapter / name).unlink()


def recipe(text, *arguments):
    """Give a recipe to `echo-trainer sft`."""

    def give(folder):
        path = folder / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        command("sft", "--config", path, *arguments)

    return give


def called(*arguments):
    return lambda folder: command(*(part(folder) if callable(part) else part for part in arguments))


def here(name):
    return lambda folder: folder / name


RUN = "output_dir: out\nuse_cpu: true\n"
ON_CPU = ("sft", "--output_dir", here("out"), "--use_cpu")

CASES = [
    BadInput(
        CHECKPOINTS,
        "a checkpoint with a cut file, by its name",
        resume(cut("optimizer.pt"), "checkpoint-4"),
        "is damaged: optimizer.pt has",
    ),
    BadInput(
        CHECKPOINTS,
        "a folder in which all checkpoints are damaged",
        resume(cut("scheduler.pt", True)),
        "all are damaged",
    ),
    BadInput(CHECKPOINTS, "a folder without any checkpoint", resume(without(None)), "it holds none"),
    BadInput(CHECKPOINTS, "a checkpoint that does not exist", resume(checkpoint="checkpoint-9"), "no such folder"),
    BadInput(
        CHECKPOINTS, "another base model", resume(model=lambda: tiny_model(num_hidden_layers=6)), "another base model"
    ),
    BadInput(CHECKPOINTS, "another global batch", resume(gradient_accumulation_steps=2), "global batch of 4 samples"),
    BadInput(CHECKPOINTS, "another echo option", resume(echo_bottleneck=16), "bottleneck was 64, is 16"),
    BadInput(CHECKPOINTS, "another seed", resume(seed=5), "seed was 1, is 5"),
    BadInput(CHECKPOINTS, "the echo switched off", resume(echo_p_start=0, echo_p_end=0), "with the echo on"),
    BadInput(
        CHECKPOINTS,
        "a checkpoint without echo networks",
        resume(lambda out: (without("echo_networks.safetensors")(out), without("echo_checkpoint.json")(out))),
        "holds no echo_networks.safetensors",
    ),
    BadInput(
        ADAPTERS,
        "`check` of a folder that does not exist",
        called("check", here("nothing")),
        "is not a folder",
        CommandError,
    ),
    BadInput(
        ADAPTERS,
        "`check` of a folder without a config",
        adapter_command("check", harm=remove("adapter_config.json")),
        "adapter_config.json",
        CommandError,
    ),
    BadInput(
        ADAPTERS,
        "`check` of a config that is no JSON",
        adapter_command("check", harm=overwrite("adapter_config.json", "{")),
        "adapter_config.json",
        CommandError,
    ),
    BadInput(
        ADAPTERS,
        "`check` of weights that are cut short",
        adapter_command("check", harm=overwrite("adapter_model.safetensors", "123")),
        "adapter_model.safetensors",
        CommandError,
    ),
    BadInput(
        ADAPTERS,
        "`check` of a folder without weights",
        adapter_command("check", harm=remove("adapter_model.safetensors")),
        "adapter_model.safetensors",
        CommandError,
    ),
    BadInput(
        ADAPTERS,
        "`check` of a config whose rank is not that of the tensors",
        adapter_command("check", harm=edit_config(r=64)),
        "64",
        CommandError,
    ),
    BadInput(
        ADAPTERS,
        "`export --portable` of an adapter that only says it is DoRA",
        adapter_command("export", "--portable", here("new"), harm=edit_config(use_dora=True)),
        "lora_magnitude_vector",
        CommandError,
    ),
    BadInput(ADAPTERS, "`export` without a form", adapter_command("export", here("new")), "--portable", CommandError),
    BadInput(
        ADAPTERS,
        "`push` of a folder without an adapter",
        called("push", here("nothing"), "me/mine"),
        "nothing",
        CommandError,
    ),
    BadInput(
        ADAPTERS,
        "`push --attempts 0`",
        called("push", here("nothing"), "me/mine", "--attempts", 0),
        "0 attempts",
        CommandError,
    ),
    BadInput(
        COMMANDS,
        "`evaluate --device` without such a device",
        called("evaluate", QUICKSTART_BASE, "--tasks", QUICKSTART_BASE.parent / "test.jsonl", "--device", "cuda:99"),
        "cannot be used here",
        CommandError,
    ),
    BadInput(
        COMMANDS,
        "`evaluate` of a file that is not there",
        called("evaluate", QUICKSTART_BASE, "--tasks", "nowhere.jsonl"),
        "no file nowhere.jsonl",
        CommandError,
    ),
    BadInput(RECIPES, "a file that is no YAML", recipe("output_dir: x\n  bad: [1\n"), "is not YAML", CommandError),
    BadInput(RECIPES, "an empty file", recipe(""), "is empty", CommandError),
    BadInput(RECIPES, "a list", recipe("- output_dir\n"), "holds a list", CommandError),
    BadInput(RECIPES, "a file that is no text", recipe(b"\xff\xfe\x00"), "is not text", CommandError),
    BadInput(
        RECIPES, "`echop_start: 1`", recipe(RUN + "echop_start: 1\n"), "Did you mean 'echo_p_start'", CommandError
    ),
    BadInput(RECIPES, "`zzzzz: 1`", recipe(RUN + "zzzzz: 1\n"), "--help` lists", CommandError),
    BadInput(
        RECIPES, "`max_steps: [1, 2]`", recipe(RUN + "max_steps: [1, 2]\n"), "takes a whole number", CommandError
    ),
    BadInput(RECIPES, "`max_steps:` without a value", recipe(RUN + "max_steps:\n"), "has no value", CommandError),
    BadInput(RECIPES, "`learning_rate: true`", recipe(RUN + "learning_rate: true\n"), "takes a number", CommandError),
    BadInput(
        RECIPES,
        "`learning_rate: fast`",
        recipe(RUN + "learning_rate: fast\n"),
        "invalid float value: 'fast'",
        CommandError,
    ),
    BadInput(
        RECIPES, "`run_name: 2026-01-01`", recipe(RUN + "run_name: 2026-01-01\n"), "Put it in quotes", CommandError
    ),
    BadInput(
        RECIPES, "`env: {HF_TOKEN: x}`", recipe(RUN + "env: {HF_TOKEN: x}\n"), "set them in the shell", CommandError
    ),
    BadInput(
        RECIPES,
        "`model_init_kwargs: {offload_folder: /x}`",
        recipe(RUN + "model_init_kwargs: {offload_folder: /x}\n"),
        "outside output_dir",
        CommandError,
    ),
    BadInput(RECIPES, "`lora_layers: cca`", recipe(RUN + "lora_layers: cca\n"), "can be one of ['cka'", CommandError),
    BadInput(COMMANDS, "`echo-trainer nonsense`", called("nonsense"), "is no command", CommandError),
    BadInput(COMMANDS, "`--config` and nothing after it", called("sft", "--config"), "needs the name", CommandError),
    BadInput(
        COMMANDS,
        "a recipe that does not exist",
        called("sft", "--config", "no-such-recipe"),
        "neither a file nor one that ships",
        CommandError,
    ),
    BadInput(COMMANDS, "`sft` without data", called(*ON_CPU, "--model_name_or_path", "m"), "No dataset", CommandError),
    BadInput(COMMANDS, "`sft` without a model", called(*ON_CPU, "--dataset_name", "d"), "No model", CommandError),
    BadInput(COMMANDS, "`--echo_p_start 2`", called(*ON_CPU, "--echo_p_start", "2"), "not in [0, 1]", CommandError),
    BadInput(
        COMMANDS, "`quickstart --steps 0`", called("quickstart", "--steps", "0"), "at least 1 step", CommandError
    ),
    BadInput(COMMANDS, "an unknown engine", adapter_command("check", "--engine", "foo"), "foo", CommandError),
]
