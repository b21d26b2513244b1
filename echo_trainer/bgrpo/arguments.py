"""The options of `echo-trainer bgrpo`, from the command line and a recipe."""

from dataclasses import dataclass, field
from typing import cast

from trl import ScriptArguments

from ..recipe.arguments import AdapterArguments, make_parser, parse
from ..recipe.read import named_recipe
from .accuracy import WIDTHS
from .config import BeamGRPOConfig

PROG = "echo-trainer bgrpo"


@dataclass
class BeamArguments(ScriptArguments):
    """TRL's script arguments, what judges completions, and what is measured before and after."""

    verifier: str | None = field(
        default=None,
        metadata={
            "help": "What says whether a completion is right: FILE.py:FUNCTION or MODULE:FUNCTION, a function of "
            "(prompt, completion, row). A file is looked for here, then among the shipped recipes."
        },
    )
    prompt_column: str = field(
        default="prompt", metadata={"help": "Column that holds the prompt; the verifier gets the others."}
    )
    adapter_name_or_path: str | None = field(
        default=None, metadata={"help": "A trained adapter to go on with, such as one of `echo-trainer sft`."}
    )
    beam_eval_rows: int = field(
        default=200, metadata={"help": "Rows of the test split that are answered before and after; 0: none."}
    )
    beam_eval_widths: list[int] = field(
        default_factory=lambda: list(WIDTHS), metadata={"nargs": "+", "help": "Beam widths they are answered with."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete the finished run that `output_dir` holds. Without it, it is refused."}
    )


CLASSES = (BeamArguments, BeamGRPOConfig, AdapterArguments)


def parse_beams(arguments: list[str]) -> tuple[BeamArguments, BeamGRPOConfig, AdapterArguments]:
    """
    Arguments of a run.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: the recipe or an option cannot work.
    """
    _, options, rest = named_recipe(arguments)
    echoes = [key for key in options if str(key).startswith("echo_")]
    echoes += [word.lstrip("-").split("=")[0] for word in rest if word.startswith("--echo_")]
    if echoes:
        raise ValueError(
            f"{echoes[0]} is an option of the echo, which belongs to supervised fine-tuning: train with "
            f"`echo-trainer sft` first, then its adapter with `{PROG} --adapter_name_or_path`."
        )
    found = cast(
        "tuple[BeamArguments, BeamGRPOConfig, AdapterArguments]", parse(arguments, make_parser(PROG, CLASSES), CLASSES)
    )
    data = found[0]
    if data.beam_eval_rows < 0:
        raise ValueError(f"beam_eval_rows={data.beam_eval_rows}: write a number of rows, or 0 for no measurement.")
    if not data.beam_eval_widths or min(data.beam_eval_widths) < 1:
        raise ValueError(
            f"beam_eval_widths={data.beam_eval_widths}: a search has at least one beam (1 is greedy). Write widths "
            f"such as 1 5 10, or --beam_eval_rows 0 for no measurement."
        )
    return found
