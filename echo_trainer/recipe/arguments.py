"""The options of a run, as dataclasses: TRL's own and ours, from the command line, a recipe, or a dict."""

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any, cast

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from ..config import EchoSFTConfig
from ..method.depth import CKA
from ..templates import TEMPLATES
from .check import check_options
from .read import named_recipe

LAYER_BASELINES = ("first-half-plus-last", "last", "random", "uniform")


@dataclass
class DataArguments(ScriptArguments):
    """TRL's script arguments, and how to turn the dataset's columns into prompts and completions."""

    dataset_template: str | None = field(
        default=None,
        metadata={
            "help": "How to make prompts and completions from the columns instruction/output (LLM-Adapters) or "
            "question_stem/choices/answerKey (OpenBookQA), or those that prompt_column and completion_column name: "
            "'alpaca' (text, for base models) or 'chat' (messages, for models with a chat template). "
            "None: the dataset is in a format of TRL already.",
            "choices": [*TEMPLATES],
        },
    )
    prompt_column: str | None = field(
        default=None,
        metadata={"help": "Column that holds the prompt, for a dataset with other names, such as a CSV file."},
    )
    completion_column: str | None = field(default=None, metadata={"help": "Column that holds the answer."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete the finished run that `output_dir` holds. Without it, it is refused."}
    )


@dataclass
class AdapterArguments(ModelConfig):
    """TRL's model arguments; Echo-LoRA always trains an adapter, on all linear layers unless told otherwise."""

    use_peft: bool = field(default=True, metadata={"help": "Train an adapter. Echo-LoRA needs one."})
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["all-linear"],
        metadata={"nargs": "+", "help": "Modules that get LoRA, by name; 'all-linear' is every linear layer."},
    )
    lora_layers: str | None = field(
        default=None,
        metadata={
            "help": "Adapt half of the layers: 'cka' (the most important ones by layer selection on the data), or "
            "a baseline to compare it with. None: all layers.",
            "choices": [CKA, *LAYER_BASELINES],
        },
    )
    lora_layers_ratio: float = field(
        default=0.5, metadata={"help": "Share of the layers that `lora_layers` adapts, in (0, 1]."}
    )


CLASSES = (DataArguments, EchoSFTConfig, AdapterArguments, DatasetMixtureConfig)
"""Where the options of a run are declared."""

Arguments = tuple[DataArguments, EchoSFTConfig, AdapterArguments, DatasetMixtureConfig]


def make_parser(prog: str = "echo-trainer sft", classes: tuple[type, ...] = CLASSES, **options: Any) -> TrlParser:
    """The parser: every field of the classes. An option is written out; its beginning alone is refused."""
    usage = f"{prog} [--config RECIPE] [--OPTION VALUE ...]"
    return TrlParser(cast("Any", classes), prog=prog, usage=usage, allow_abbrev=False, **options)


def parse(arguments: list[str], parser: TrlParser | None = None, classes: tuple[type, ...] = CLASSES) -> tuple:
    """
    Arguments of a run from the command line and the recipe that `--config` names.

    Args:
        arguments: of the command.
        parser: of the classes; None makes that of `echo-trainer sft`.
        classes: the dataclasses whose fields may be set.

    Returns:
        An instance of each class.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: the recipe or an option cannot work.
    """
    path, options, rest = named_recipe(arguments)
    parser = parser or make_parser(classes=classes)
    if path is not None:
        check_options(path, options, classes, parser.prog)
        parser.set_defaults_with_config(**options)
    *found, unknown = parser.parse_args_into_dataclasses(rest, look_for_args_file=False, return_remaining_strings=True)
    if unknown:
        options = [f"--{field.name}" for cls in classes for field in dataclasses.fields(cls)]
        raise ValueError(_unknown(unknown[0], options, parser.prog))
    return tuple(found)


def _unknown(word: str, options: list[str], command: str) -> str:
    close = difflib.get_close_matches(word.split("=")[0], options, n=1)
    advice = f"Did you mean {close[0]}?" if close else f"`--help-all` lists the options of `{command}`."
    return f"There is no option {word!r}, and nothing that it could be the value of. {advice}"


def arguments_of(options: dict[str, Any]) -> Arguments:
    """Arguments of a run from options that `check.check_options` has looked at."""
    parser = make_parser()
    parser.set_defaults_with_config(**options)
    return cast("Arguments", parser.parse_args_into_dataclasses([], look_for_args_file=False))
