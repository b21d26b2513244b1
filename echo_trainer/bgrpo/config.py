"""Options of beam GRPO: `BeamGRPOConfig` is `trl.GRPOConfig` with other defaults and flat `beam_*` fields."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from trl import GRPOConfig

from ..options import WithoutTokens
from .rewards import REWARDS, WRONG, Reward, name_of_reward
from .verifier import load_callable

OURS = ("num_beams", "num_return_sequences", "do_sample", "length_penalty", "early_stopping")
"""Options of `generate` that make the group; nobody else may set them."""

SAMPLING = {"temperature": (1.0,), "top_p": (1.0,), "top_k": (0, None), "min_p": (None,), "repetition_penalty": (1.0,)}
"""What a beam search has no use for, or what would rank beams by something else, and the values that say nothing."""

if TYPE_CHECKING:
    RewardField = str | Reward
    Decay = float | None
else:
    RewardField = str  # for the command line, whose parser takes one type
    Decay = float | None


@dataclass
class BeamGRPOConfig(WithoutTokens, GRPOConfig):
    r"""
    Configuration of [`BeamGRPOTrainer`]: every option of `trl.GRPOConfig`, and how beams are rewarded.

    The loss, with the symbols of the paper (arXiv 2508.15766); o_i is beam i of a prompt q, i = 0 the best:

        L = - (1 / tokens) * sum_i sum_t [ min(rho A_i, clip(rho, 1 - eps, 1 + eps) A_i) - beta KL_it ]
        A_i = r_i - mean_j r_j,   rho = pi(o_it) / pi_old(o_it),   KL_it = k3 estimate against the start

    | field | symbol | default (of `GRPOConfig`) | range |
    |---|---|---|---|
    | `num_generations` | G, the beam width | 10 (8) | >= 2, below the vocabulary's size |
    | `per_device_train_batch_size` * `steps_per_generation` | rows of a process | 10 * 20 | a multiple of G |
    | `num_iterations` | steps on the same beams | 5 (1) | >= 1 |
    | `beta` | beta | 0.01 (0) | >= 0 |
    | `use_bias_correction_kl` | KL times rho | False (True) | |
    | `disable_dropout` | beams and both log-probabilities by the same model | True (False) | |
    | `scale_rewards` | division by the standard deviation | "none" ("group") | "none", "group", "batch" |
    | `loss_type` | mean over the completion tokens of a micro-batch | "bnpo" ("dapo") | TRL's |
    | `learning_rate`, `max_grad_norm` | | 1e-5 (1e-6), 0.5 (1) | > 0 |
    | `beam_reward` | r_i as a function of (right, i, G) | "rank" | "rank", "simple", "reverse_rank", a function |
    | `beam_decay` | D in exp(-i / D) | None: G | > 0 |
    | `beam_wrong` | w, what a wrong beam costs | 0.1 | >= 0 |
    | `beam_zero_sum` | negative rewards of a mixed group scaled to a sum of 0 | False | |

    `scale_rewards="group"` is the first version of the paper, "none" the corrected one. The paper's public code has a
    decay of 32 for every G.

    Raises:
        ValueError: an option cannot work with beams; the message says what to write instead.
    """

    if TYPE_CHECKING:
        output_dir: str = "trainer_output"  # which the arguments put in the place of None

    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate for AdamW."})
    max_grad_norm: float = field(default=0.5, metadata={"help": "Largest norm of the gradient."})
    per_device_train_batch_size: int = field(
        default=10,
        metadata={"help": "Rows of a micro-batch. Times `steps_per_generation` it must be a multiple of G."},
    )
    gradient_accumulation_steps: int = field(
        default=20, metadata={"help": "Micro-batches of an optimizer step, and, by default, of a generation."}
    )
    num_generations: int | None = field(
        default=10, metadata={"help": "Beam width G: each prompt is answered by its G best beams."}
    )
    num_iterations: int = field(default=5, metadata={"help": "Optimizer steps on the same beams."})
    beta: float = field(default=0.01, metadata={"help": "Weight of the KL divergence from the model at the start."})
    use_bias_correction_kl: bool = field(
        default=False,
        metadata={
            "help": "Multiply the KL term by the ratio. That makes its gradient right for samples of the policy, "
            "which beams are not; the paper has the plain k3 estimate."
        },
    )
    disable_dropout: bool = field(
        default=True,
        metadata={
            "help": "Train without dropout, which would move the ratio of fresh beams away from 1 by chance, so that "
            "tokens are clipped before anything is learnt."
        },
    )
    scale_rewards: str = field(
        default="none",
        metadata={
            "help": "'none': advantages are rewards minus their group's mean; 'group': also divided by its standard "
            "deviation (the paper's first version); 'batch': by that of the batch."
        },
    )
    loss_type: str = field(
        default="bnpo", metadata={"help": "'bnpo': the mean over the completion tokens of a micro-batch."}
    )
    beam_reward: RewardField = field(
        default="rank",
        metadata={
            "help": "Reward of a right beam of rank i: 'rank' (exp(-i / D)), 'simple' (1), 'reverse_rank' "
            "(exp(i / D), and wrong beams cost less the later they come). In Python also a function of (right, rank, "
            "G), on the command line FILE.py:FUNCTION.",
        },
    )
    beam_decay: Decay = field(default=None, metadata={"help": "Decay D of the reward with the rank. None: G."})
    beam_wrong: float = field(default=WRONG, metadata={"help": "What a wrong beam costs, >= 0."})
    beam_zero_sum: bool = field(
        default=False,
        metadata={"help": "Scale the negative rewards of groups with right and wrong beams to a sum of zero."},
    )
    portable_adapter: bool = field(
        default=True,
        metadata={"help": "Write the final adapter in the form that every serving engine reads correctly."},
    )

    def __post_init__(self):
        if self.bf16 is None and not self.fp16 and (self.use_cpu or not torch.accelerator.is_available()):
            self.bf16 = False  # refused on a CPU, or slow
        refuse_what_samples(self)
        if isinstance(self.beam_reward, str) and ":" in self.beam_reward:
            self.beam_reward = load_callable(self.beam_reward, "beam_reward")
        check_beam_fields(self)
        if not self.num_generations or self.num_generations < 2:
            raise ValueError(
                f"num_generations={self.num_generations}: a group is compared with itself, so it needs at least two "
                f"beams. Write num_generations=10, or train with `SFTTrainer`."
            )
        if self.generation_batch_size is None:  # before TRL, which speaks of all processes together
            refuse_split_groups(self, self.steps_per_generation or self.gradient_accumulation_steps)
        super().__post_init__()
        refuse_what_samples(self)  # again: TRL has parsed options that were given as JSON
        assert self.steps_per_generation is not None  # set by `GRPOConfig`
        refuse_split_groups(self, self.steps_per_generation)

    def to_dict(self) -> dict[str, Any]:
        """What is logged, as JSON: of a reward of one's own the name."""
        return {**super().to_dict(), "beam_reward": name_of_reward(self.beam_reward)}

    def __getstate__(self) -> dict[str, Any]:
        """What `torch.save` and `pickle` see: no access token, and of a reward of one's own the name."""
        return {**super().__getstate__(), "beam_reward": name_of_reward(self.beam_reward)}


def check_beam_fields(config: Any) -> None:
    """Refuse rewards that there are not, and verifiers that would see nothing, with a ValueError."""
    if config.remove_unused_columns:
        raise ValueError(
            "remove_unused_columns=True would remove all columns but the prompt, and the verifier reads them. Leave "
            "it out (False)."
        )
    if not callable(config.beam_reward) and config.beam_reward not in REWARDS:
        raise ValueError(
            f"beam_reward={config.beam_reward!r} is none of {', '.join(REWARDS)}, and no function of (right, rank, "
            f"group size)."
        )
    if config.beam_decay is not None and not (math.isfinite(config.beam_decay) and config.beam_decay > 0):
        raise ValueError(f"beam_decay={config.beam_decay}: write a number above 0, or None for the group's size.")
    if not (math.isfinite(config.beam_wrong) and config.beam_wrong >= 0):
        raise ValueError(f"beam_wrong={config.beam_wrong}: it is what a wrong beam costs; write a number >= 0.")


def refuse_what_samples(config: Any) -> None:
    """Refuse, with a ValueError, what only samples, and options of sampling."""
    for name, what in (
        ("use_vllm", "vLLM"),
        ("use_transformers_paged", "continuous batching"),
        ("use_transformers_continuous_batching", "continuous batching"),
    ):
        if getattr(config, name):
            raise ValueError(
                f"{name}=True: {what} samples and has no beam search here, and beams are what this trainer is about. "
                f"Write {name}=False, or sample with trl's GRPOTrainer."
            )
    for name, neutral in SAMPLING.items():
        value = getattr(config, name)
        if value not in neutral:
            raise ValueError(
                f"{name}={value}: beams are ranked by the model's own log-probability, without sampling, so {name} "
                f"would do nothing or rank them by something else. Leave it out ({neutral[0]})."
            )
    given = config.generation_kwargs if isinstance(config.generation_kwargs, dict) else {}
    if clash := [name for name in (*OURS, *SAMPLING) if name in given]:
        raise ValueError(
            f"generation_kwargs sets {', '.join(clash)}. A group is the num_generations best beams by summed "
            f"log-probability, so that is not open; write num_generations for the beam width."
        )


def refuse_split_groups(config: Any, steps: int) -> None:
    """Refuse, with a ValueError, batches that do not hold whole groups on every process; `steps` of a generation."""
    rows, width = config.per_device_train_batch_size * steps, config.num_generations
    if rows % width:
        raise ValueError(
            f"A process generates per_device_train_batch_size * steps_per_generation = "
            f"{config.per_device_train_batch_size} * {steps} = {rows} rows at a time, which is "
            f"no multiple of num_generations={width}: the beams of a prompt come from one search, so a group lies on "
            f"one process. Write per_device_train_batch_size={width}, or another multiple."
        )
    width = config.num_generations_eval or width
    if config.eval_strategy != "no" and config.per_device_eval_batch_size % width:
        raise ValueError(
            f"per_device_eval_batch_size={config.per_device_eval_batch_size} is no multiple of the {width} beams of a "
            f"prompt in evaluation. Write per_device_eval_batch_size={width}, or num_generations_eval=1 (greedy)."
        )
