"""What beam GRPO cannot do, said before a model is loaded or trained."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import ProcessorMixin
from trl import GRPOConfig

from ..compat.identity import name_of
from ..config import EchoSFTConfig
from .config import BeamGRPOConfig
from .scoring import NOT_COLUMNS
from .start import refuse_start

IMAGES = ("image", "images")
TAKEN = ("completion", "prompts", "completions", *NOT_COLUMNS)
"""Names that TRL gives to something else than a column where it calls a reward function."""


def as_beam_config(args: Any, model: Any) -> BeamGRPOConfig:
    """
    The configuration of a trainer: `args` itself, or all defaults.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(args, BeamGRPOConfig):
        return args
    if args is None:
        name = model if isinstance(model, str) else name_of(model.config) or "model"
        return BeamGRPOConfig(f"{name.rstrip('/').split('/')[-1]}-BGRPO")
    if isinstance(args, EchoSFTConfig):
        raise TypeError(
            "`args` is an EchoSFTConfig. The echo belongs to supervised fine-tuning: train with EchoSFTTrainer first, "
            "then its adapter with BeamGRPOTrainer and a BeamGRPOConfig, which has no echo options."
        )
    more = " Its defaults are others: see the table in BeamGRPOConfig." if isinstance(args, GRPOConfig) else ""
    raise TypeError(f"`args` is a {type(args).__name__}. Pass a BeamGRPOConfig.{more}")


def refuse_arguments(call: dict[str, Any]) -> None:
    """
    Refuse arguments of TRL's trainer that cannot work with beams.

    Args:
        call: arguments of `GRPOTrainer`, by name.

    Raises:
        ValueError: what it is, and what to do instead.
    """
    for name, why in (
        ("tools", "a completion with tool calls is generated in several turns, and a beam search is one"),
        ("environment_factory", "an environment answers between turns, and a beam search is one turn"),
        ("rollout_func", "it generates the completions itself, and the beams of a prompt are what is trained on here"),
    ):
        if call.get(name):
            raise ValueError(f"`{name}` does not go with beams: {why}. Use trl's GRPOTrainer for it.")
    if isinstance(call.get("processing_class"), ProcessorMixin):
        raise ValueError(
            "`processing_class` is the processor of a model with images. Beam GRPO trains on text: pass its tokenizer."
        )
    for name in ("train_dataset", "eval_dataset"):
        given = call.get(name)
        for dataset in given.values() if isinstance(given, dict) else (given,):
            _refuse_columns(name, getattr(dataset, "column_names", None) or ())
    refuse_start(call["model"], call.get("peft_config"), call["args"].beta)


def _refuse_columns(name: str, columns: Sequence[str]) -> None:
    if columns and "prompt" not in columns:
        raise ValueError(
            f"`{name}` has the columns {', '.join(columns)}, and no column 'prompt', which is what the model answers. "
            f"Rename the one that holds prompts (on the command line: --prompt_column)."
        )
    if found := [column for column in IMAGES if column in columns]:
        raise ValueError(f"`{name}` has the column {found[0]!r}. Beam GRPO trains on text: leave it out.")
    if found := [column for column in TAKEN if column in columns]:
        raise ValueError(
            f"`{name}` has the column {found[0]!r}, which TRL takes for its own (what the model writes, for example), "
            f"so the verifier would not see it. Rename it, to 'answer' for example, or remove it."
        )


def refuse_few_prompts(dataset: Any, args: BeamGRPOConfig) -> None:
    """Refuse, with a ValueError, a dataset with fewer prompts than one generation takes."""
    assert args.generation_batch_size is not None and args.num_generations  # set by `GRPOConfig`
    needed = args.generation_batch_size // args.num_generations
    if isinstance(dataset, Dataset) and len(dataset) < needed:
        raise ValueError(
            f"The dataset has {len(dataset)} prompts, and a generation takes {needed} (generation_batch_size "
            f"{args.generation_batch_size} / num_generations {args.num_generations}), so there would be no step. "
            f"Give more prompts, or lower gradient_accumulation_steps or steps_per_generation."
        )


def refuse_no_step(state: Any, args: BeamGRPOConfig) -> None:
    """Refuse, with a ValueError, a run that ended without a step though there should be some: its stream was short."""
    assert args.generation_batch_size is not None and args.num_generations  # set by `GRPOConfig`
    if state.max_steps > 0 and not state.global_step:
        raise ValueError(
            f"Nothing was trained: the streamed dataset ended before the {args.generation_batch_size} / "
            f"{args.num_generations} = {args.generation_batch_size // args.num_generations} prompts that a generation "
            f"takes. Give more prompts, or lower gradient_accumulation_steps or steps_per_generation."
        )


def refuse_wide_beams(width: int, vocabulary: int, n_ends: int) -> None:
    """
    Refuse more beams than a first token allows, with a ValueError.

    Args:
        width: G.
        vocabulary: number of tokens that the model knows.
        n_ends: tokens that end a completion; no beam goes on after them.
    """
    if width > vocabulary - n_ends:
        raise ValueError(
            f"num_generations={width} beams, and the vocabulary has {vocabulary} tokens, {n_ends} of which end a "
            f"completion: the first token of a beam search could not be {width} different ones, and beams would be "
            f"double. Write at most num_generations={max(vocabulary - n_ends, 1)}."
        )
