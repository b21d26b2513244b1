"""`echo-trainer bgrpo`: a run of beam GRPO from a recipe and the command line."""

from ..bgrpo.arguments import CLASSES, PROG, parse_beams
from ..bgrpo.run import run
from ..recipe.arguments import make_parser
from .short_help import on_a_screen

HEAD = """echo-trainer bgrpo [--config RECIPE] [--OPTION VALUE ...]

Rank-aware beam GRPO: train a model on its own beams, judged by a verifier and rewarded by rank. For tasks whose
answers a program can check, and models that answer with a beam search; the model must be right now and then already.

  echo-trainer bgrpo --config polynomials/bgrpo
  echo-trainer bgrpo --model_name_or_path base --adapter_name_or_path runs/sft --dataset_name prompts.jsonl \\
      --verifier checks.py:is_right --output_dir runs/beams
"""
FOOT = "All options, TRL's too: `echo-trainer bgrpo --help-all`. The same names are the keys of a recipe."
OPTIONS = {
    "data and verifier": "verifier dataset_name prompt_column dataset_test_split beam_eval_rows beam_eval_widths",
    "beams": "num_generations beam_reward beam_decay beam_wrong beam_zero_sum max_completion_length num_iterations "
             "beta scale_rewards",
    "model": "model_name_or_path adapter_name_or_path use_peft lora_r lora_alpha lora_target_modules "
             "portable_adapter",
    "training": "output_dir overwrite_output_dir resume_from_checkpoint max_steps learning_rate "
                "per_device_train_batch_size gradient_accumulation_steps bf16 save_steps logging_steps report_to "
                "seed push_to_hub",
}  # fmt: skip


def main(arguments: list[str]) -> int:
    """Entry point of `echo-trainer bgrpo`."""
    if {"-h", "--help"} & set(arguments):
        print(help_text())
        return 0
    if "--help-all" in arguments:
        make_parser(PROG, CLASSES, description="See `echo-trainer bgrpo --help`.").print_help()
        return 0
    run(*parse_beams(arguments))
    return 0


def help_text(width: int | None = None) -> str:
    """Help on one screen."""
    groups = {group: names.split() for group, names in OPTIONS.items()}
    return on_a_screen(HEAD, groups, FOOT, CLASSES, width)
