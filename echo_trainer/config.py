"""Options of Echo-LoRA: `EchoSFTConfig` is `trl.SFTConfig` plus flat `echo_*` fields.

Override: only fields; their validation is in `options.py`. Everything `SFTConfig` knows keeps its meaning.
"""

import dataclasses
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments
from transformers.utils import logging
from trl import SFTConfig

from .compat.identity import name_of
from .fields import EchoFields
from .options import (
    check_echo_fields,
    check_row_fields,
    fill_from_preset,
    layer_list,
    marker,
    refuse_options_without_an_echo,
)

logger = logging.get_logger(__name__)


@dataclass
class EchoSFTConfig(EchoFields, SFTConfig):
    r"""
    Configuration of [`EchoSFTTrainer`]: every option of `trl.SFTConfig`, and the options of Echo-LoRA.

    The loss of one optimizer step k, with the symbols of the paper (arXiv 2605.08177):

        L = (1 / N) * sum_i w_i * [ CE_plain_i + r_i * (CE_echo_i + lambda_kd * KD_i) ],   r_i ~ Bernoulli(p_k)

    | field | symbol | unit, range |
    |---|---|---|
    | `echo_preset` | where what is not set comes from | "paper", "strong" |
    | `echo_source_layers` | S | indices of decoder layers, negative counts from the end, "depth", "cka" or "above" |
    | `echo_target_layers` | M | indices, "depth", "cka" or "lowest"; every target lies below every source |
    | `echo_bottleneck` | width of P1, G1 | features, >= 1 |
    | `echo_gate`, `echo_gate_bias` | g, b_g | "sigmoid", "none"; a number |
    | `echo_scale` | lambda_m at the start | > 0 |
    | `echo_detach` | stop-gradient on z | True, False |
    | `echo_aggregation` | how S is combined into z | a name in `method.aggregation.AGGREGATIONS`, such as "mean" |
    | `echo_positions` | where delta is added | "answer", "predicting" |
    | `echo_p_start`, `echo_p_end` | p_0, p_{K-1} | probability, [0, 1] |
    | `echo_loss` | w_i | "sum" (1), "mean" (1 / (1 + r_i)) |
    | `echo_kd_weight` | lambda_kd | >= 0 |
    | `echo_kd_temperature` | tau | > 0 |
    | `echo_teacher` | direction of the distillation | "echo", "plain", "mutual" |
    | `echo_pass` | how the echo pass is computed | "auto", or one of `passes.echo.FORMS`, such as "suffix" |
    | `echo_memory` | what it keeps for backward | "auto", "store", "recompute" |
    | `echo_layers` | where the decoder layers are | dotted name of their list in the model, None = found |
    | `echo_learning_rate` | rate of the echo networks | > 0, None = `learning_rate` |
    | `echo_seed` | seed of routing and echo initialisation | integer >= 0, None = `seed` |
    | `assistant_only_loss` | answers are the assistant's turns | True, False, None = where rows are conversations |
    | `answer_marker`, `prompt_marker` | what stands before answers and prompts in a text | text, None = found |
    | `drop_without_marker` | what becomes of texts without the marker | True, False = an error |
    | `echo_probation` | when the echo is judged on held-out rows | share of the run < 1, steps, 0 = never |
    | `echo_held_out` | rows set aside for that | integer >= 0 |
    | `echo_when_useless` | what follows | "say", "stop" |
    | `frozen_prefix_cache` | whether layers below the first trained one run once for each document | True, False |
    | `portable_adapter` | form of the final adapter | True, False |
    | `card_prompt` | what the model card shows of the prompts | "none", "format", "example" |

    A preset gives values to options that are None, and to no other; afterwards none of them is. With
    `echo_p_start = echo_p_end = 0` the trainer is `SFTTrainer`, step for step and bit for bit.

    Raises:
        ValueError: an `echo_*` value is outside its range, or an option of `SFTConfig` cannot work with the echo.
    """

    if TYPE_CHECKING:
        output_dir: str = "trainer_output"  # which the arguments put in the place of None

    def __post_init__(self):
        if self.bf16 is None and not self.fp16 and (self.use_cpu or not torch.accelerator.is_available()):
            # TRL's bf16 is refused on a CPU, or with `use_cpu` emulated, six to twelve times slower than float32.
            self.bf16 = False
            logger.warning_once("Training on a CPU in float32, the fastest there; bf16=True takes bfloat16.")
        super().__post_init__()
        self.check()

    def check(self) -> None:
        """
        Look at the options as they are now; the trainer does so once more when training begins.

        Raises:
            ValueError: an `echo_*` value is outside its range, or an option of `SFTConfig` cannot work with the echo.
        """
        fill_from_preset(self)
        check_echo_fields(self)
        for name in ("answer_marker", "prompt_marker"):
            setattr(self, name, marker(name, getattr(self, name)))
        check_row_fields(self)
        for name in ("echo_source_layers", "echo_target_layers"):
            setattr(self, name, layer_list(name, getattr(self, name)))
        if self.echo_enabled:
            refuse_options_without_an_echo(self)

    @property
    def echo_enabled(self) -> bool:
        """Whether any sample can ever be routed to the echo pass."""
        return self.echo_p_start > 0 or self.echo_p_end > 0

    def switch_on_assistant_only_loss(self) -> None:
        """Set `assistant_only_loss`, and remember that nobody asked for it."""
        self.assistant_only_loss = self.switched_on = True

    def forget_what_was_switched_on(self) -> None:
        """Put back what an earlier trainer switched on for its own rows."""
        if getattr(self, "switched_on", False):
            self.assistant_only_loss, self.switched_on = None, False

    @property
    def resolved_echo_seed(self) -> int:
        """`echo_seed`, or `seed` where it is not set."""
        return self.seed if self.echo_seed is None else self.echo_seed


def as_echo_config(args: Any, model: Any) -> EchoSFTConfig:
    """
    The configuration of a trainer: `args` itself, an `SFTConfig` with the echo's defaults, or all defaults.

    Raises:
        TypeError: it is something else.
        ValueError: an option of `args` cannot work with the echo.
    """
    if isinstance(args, EchoSFTConfig):
        return args
    if args is None:
        name = model if isinstance(model, str) else name_of(model.config) or "model"
        return EchoSFTConfig(f"{name.rstrip('/').split('/')[-1]}-Echo-SFT")
    if not isinstance(args, TrainingArguments):
        raise TypeError(
            f"`args` is a {type(args).__name__}. Pass an EchoSFTConfig, or an SFTConfig to use the echo's defaults."
        )
    values = vars(args)
    if not values.get("assistant_only_loss"):  # there False is what nobody has set
        values["assistant_only_loss"] = None
    if not isinstance(args, SFTConfig):
        fields = {field.name: values[field.name] for field in dataclasses.fields(args) if field.init}
        return EchoSFTConfig(**fields)
    config = _with_echo(type(args), values)
    config.check()
    return config


def _with_echo(config_class: type[SFTConfig], values: dict[str, Any]) -> EchoSFTConfig:
    """
    A config with the echo's options beside those of an `SFTConfig`, or of a class that somebody else made of it.

    Args:
        config_class: its fields, methods and properties are there, too.
        values: attributes of a config of that class. They are shared, as a trainer shares the arguments it is given:
            what is set on one later is seen by both. Those of the echo that it lacks are added.
    """
    config = object.__new__(_class_with_echo(config_class))
    for option in dataclasses.fields(EchoSFTConfig):
        values.setdefault(option.name, option.default)
    config.__dict__ = values
    return config


@cache
def _class_with_echo(config_class: type[SFTConfig]) -> type[EchoSFTConfig]:
    if issubclass(EchoSFTConfig, config_class):
        return EchoSFTConfig

    def reduce(self: EchoSFTConfig) -> tuple:
        return _with_echo, (config_class, self.__getstate__())  # pickle would look for a class that has no place

    members = {"__reduce__": reduce, "__doc__": config_class.__doc__}
    return dataclass(type(f"Echo{config_class.__name__}", (EchoSFTConfig, config_class), members))


def kept_by_truncation(config: SFTConfig) -> slice:
    """The part of a row that training keeps."""
    if config.max_length is None:
        return slice(None)
    return slice(-config.max_length, None) if config.truncation_mode == "keep_end" else slice(config.max_length)


def router_loss_weight(args: EchoSFTConfig, model_config: Any) -> float | None:
    """Weight of the load-balancing loss of a mixture of experts, by TRL's rule; None where there is none."""
    config = model_config.get_text_config()
    weight = args.router_aux_loss_coef
    weight = getattr(config, "router_aux_loss_coef", 0.0) if weight is None else weight
    return weight if weight and hasattr(config, "output_router_logits") else None
