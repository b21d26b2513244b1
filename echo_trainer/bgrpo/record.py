"""What is written down about a run of beam GRPO."""

from typing import Any

from ..report.record import common_record
from .rewards import name_of_reward


def beam_record(trainer: Any, dataset_name: str | None = None) -> dict[str, Any]:
    """
    The record of a run so far; its card is made of it alone (`model_cards/bgrpo.md.j2`).

    Args:
        trainer: a `BeamGRPOTrainer`.
        dataset_name: public id of the training data, if the caller knows it.
    """
    args = trainer.args
    seconds_before, tokens = trainer.resumption.seconds_before, int(trainer.state.num_input_tokens_seen)
    record = common_record(trainer, dataset_name, seconds_before, tokens)
    if args.load_best_model_at_end and trainer.state.best_global_step:
        record["steps"] |= {"adapter": trainer.state.best_global_step, "best_by": args.metric_for_best_model}
    return {
        **record,
        "echo": {"enabled": False},
        "prompt_format": None,
        "example": None,
        "bgrpo": {
            "group_size": args.num_generations,
            "prompts_per_generation": args.generation_batch_size // args.num_generations,
            "num_iterations": args.num_iterations,
            "beta": args.beta,
            "epsilon": args.epsilon,
            "scale_rewards": args.scale_rewards,
            "loss_type": args.loss_type,
            "max_completion_length": args.max_completion_length,
            "reward": name_of_reward(args.beam_reward),
            "decay": args.beam_decay or args.num_generations,
            "wrong": args.beam_wrong,
            "zero_sum": args.beam_zero_sum,
            "verifier": getattr(trainer.verifier, "__name__", type(trainer.verifier).__name__),
            "whole_model": not hasattr(trainer.model, "peft_config"),
            "accuracy": trainer.accuracy,
        },
    }
