"""Values that options of `EchoSFTConfig` can have; everything else is refused with what to write instead."""

import copy
from multiprocessing.context import get_spawning_popen
from typing import Any, Self

from .method.aggregation import AGGREGATIONS
from .method.depth import ABOVE, CKA, DEPTH, LOWEST
from .passes.echo import AUTO, pass_options

POSITIONS = ("answer", "predicting")
TEACHERS = ("echo", "plain", "mutual")
MEMORIES = ("auto", "store", "recompute")
GATES = ("sigmoid", "none")
LOSSES = ("sum", "mean")
WHEN_USELESS = ("say", "stop")
CARD_PROMPTS = ("none", "format", "example")
LAYER_WORDS = {
    "echo_source_layers": {
        DEPTH: "by the model's depth", CKA: "by layer selection", ABOVE: "the layer just above the targets",
    },
    "echo_target_layers": {
        DEPTH: "by the model's depth", CKA: "by layer selection", LOWEST: "the lowest layer with an adapter",
    },
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "echo_p_end": 0.2,
        "echo_gate": "sigmoid",
        "echo_scale": 0.1,
        "echo_detach": True,
        "echo_loss": "sum",
    },
    "strong": {
        "echo_p_end": 1.0,
        "echo_gate": "none",
        "echo_scale": 1.0,
        "echo_detach": False,
        "echo_loss": "mean",
        "echo_source_layers": ABOVE,
        "echo_target_layers": LOWEST,
    },
}
"""What a preset gives to options that are None."""
TOKEN_FIELDS = ("hub_token", "push_to_hub_token")


class WithoutTokens:
    """A configuration whose copies are whole, and whose pickles, which may become files, hold no access token."""

    def __copy__(self) -> Self:
        return self._duplicate(self.__dict__.copy())

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self._duplicate(copy.deepcopy(self.__dict__, memo))

    def _duplicate(self, values: dict[str, Any]) -> Self:
        duplicate = object.__new__(type(self))
        duplicate.__dict__.update(values)
        return duplicate

    def __getstate__(self) -> dict[str, Any]:
        """
        What `torch.save` and `pickle` see: everything except access tokens, since that may become a file.

        A process that is being spawned gets all of it, through a pipe.
        """
        if get_spawning_popen() is not None:
            return self.__dict__.copy()
        return {name: None if name in TOKEN_FIELDS else value for name, value in self.__dict__.items()}


def fill_from_preset(config: Any) -> None:
    """Give the options that are None the value of `echo_preset`, with a ValueError where there is no such preset."""
    _require_choice("echo_preset", config.echo_preset, tuple(PRESETS))
    for name, value in PRESETS[config.echo_preset].items():
        if getattr(config, name) is None:
            setattr(config, name, value)


def check_echo_fields(config: Any) -> None:
    """Refuse a value of a field of ours outside its range, with a ValueError. Layers are read by `layer_list`."""
    _require_choice("echo_aggregation", config.echo_aggregation, tuple(AGGREGATIONS))
    _require_choice("echo_positions", config.echo_positions, POSITIONS)
    _require_choice("echo_teacher", config.echo_teacher, TEACHERS)
    _require_choice("echo_pass", config.echo_pass, (AUTO, *pass_options()))
    _require_choice("echo_memory", config.echo_memory, MEMORIES)
    _require_choice("echo_gate", config.echo_gate, GATES)
    _require_choice("echo_loss", config.echo_loss, LOSSES)
    if not isinstance(config.echo_detach, bool):
        raise ValueError(
            f"`echo_detach` is {config.echo_detach!r}. Write true (no gradient flows from the echo back into the "
            f"plain pass) or false (it does)."
        )
    if not _is_number(config.echo_gate_bias):
        raise ValueError(
            f"`echo_gate_bias` is {config.echo_gate_bias!r}. Write a number: the gate starts near sigmoid of it, 0.12 "
            f"at -2, 0.5 at 0."
        )
    if not _is_number(config.echo_scale) or config.echo_scale <= 0:
        raise ValueError(
            f"`echo_scale` is {config.echo_scale!r}, and the projection starts at zero: with a scale of zero as well "
            f"no gradient would ever reach either. Write a number above 0, such as 0.1 or 1.0."
        )
    _require_choice("card_prompt", config.card_prompt, CARD_PROMPTS)
    _require_choice("echo_when_useless", config.echo_when_useless, WHEN_USELESS)
    if not _is_number(config.echo_probation) or config.echo_probation < 0:
        raise ValueError(
            f"`echo_probation` is {config.echo_probation!r}. Write a share of the run below 1, such as 0.1, a number "
            f"of steps, or 0 to leave the echo unjudged."
        )
    if not _is_integer(config.echo_held_out) or config.echo_held_out < 0:
        raise ValueError(
            f"`echo_held_out` is {config.echo_held_out!r}. Write how many training rows are set aside to judge the "
            f"echo on, or 0."
        )
    for name in ("echo_p_start", "echo_p_end"):
        value = getattr(config, name)
        if not _is_number(value) or not 0.0 <= value <= 1.0:
            raise ValueError(
                f"`{name}` is a probability, and {value!r} is not in [0, 1]. Write a number such as 1.0 (every "
                f"sample gets an echo pass) or 0.2 (one in five)."
            )
    if not _is_number(config.echo_kd_temperature) or config.echo_kd_temperature <= 0:
        raise ValueError(
            f"`echo_kd_temperature` divides the logits, so {config.echo_kd_temperature!r} cannot work: write a "
            f"finite number above 0, such as 2.0."
        )
    if not _is_number(config.echo_kd_weight) or config.echo_kd_weight < 0:
        raise ValueError(
            f"`echo_kd_weight` is {config.echo_kd_weight!r}, and it multiplies a loss. Write 0 (no distillation) or a "
            f"positive number such as 1.0; a negative one would push the two passes apart."
        )
    if not _is_integer(config.echo_bottleneck) or config.echo_bottleneck < 1:
        raise ValueError(
            f"`echo_bottleneck` is the width of a layer, and {config.echo_bottleneck!r} is not a whole number of "
            f"at least 1. Write for example 64."
        )
    if config.echo_learning_rate is not None and not (
        _is_number(config.echo_learning_rate) and config.echo_learning_rate > 0
    ):
        raise ValueError(
            f"`echo_learning_rate` is {config.echo_learning_rate!r}. Write a positive number, or leave it out to "
            f"use `learning_rate`. To train without an echo set echo_p_start=0 and echo_p_end=0."
        )
    if config.echo_seed is not None and (not _is_integer(config.echo_seed) or config.echo_seed < 0):
        raise ValueError(f"`echo_seed` is {config.echo_seed!r}; write a whole number of at least 0, or leave it out.")


def refuse_options_without_an_echo(config: Any) -> None:
    """Refuse options of `SFTConfig` that cannot work with the echo, with a ValueError."""
    off = "or switch the echo off with echo_p_start=0 and echo_p_end=0"
    if config.loss_type not in ("nll", "dft"):
        raise ValueError(
            f"`loss_type` is {config.loss_type!r}, which TRL does not know. Leave it out, or write 'nll'."
        )
    if config.loss_type != "nll":
        raise ValueError(
            f"`loss_type={config.loss_type!r}` re-weights the cross-entropy, and Echo-LoRA defines its loss on "
            f"plain cross-entropy. Set loss_type='nll', {off}."
        )
    if config.completion_only_loss is False and not config.assistant_only_loss:
        raise ValueError(
            "`completion_only_loss=False` trains on prompts as well, so no answer is told from its prompt, and the "
            f"echo goes from one to the other. Leave it out (completions are trained on where rows have them), {off}."
        )
    if config.label_smoothing_factor:
        raise ValueError(
            f"`label_smoothing_factor={config.label_smoothing_factor}` changes the targets of both passes, which "
            f"Echo-LoRA does not define. Set it to 0, {off}."
        )
    if (config.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise ValueError(
            "`gradient_checkpointing_kwargs={'use_reentrant': True}` drops the gradients that reach the echo "
            "networks from inside a checkpointed layer. Leave `use_reentrant` out (non-reentrant is the default), "
            f"{off}."
        )
    if config.torch_compile:
        raise ValueError(
            "`torch_compile=True` cannot work: the echo pass adds and removes hooks in every step, so the model "
            f"would be compiled again each time. Set torch_compile=False, {off}."
        )


def check_row_fields(config: Any) -> None:
    """Refuse options about rows that say nothing together, with a ValueError."""
    if config.answer_marker is None and (config.prompt_marker is not None or config.drop_without_marker):
        given = "prompt_marker" if config.prompt_marker is not None else "drop_without_marker"
        raise ValueError(
            f"`{given}` is set and `answer_marker` is not, so no text is searched for answers. Set answer_marker to "
            f"what stands before each answer, such as '### Response:\\n', or leave `{given}` out."
        )


def marker(name: str, value: Any) -> str | None:
    r"""A marker, its \n and \t read as a command line writes them; what is no text, or empty, is refused."""
    if value is not None and (not isinstance(value, str) or not value):
        raise ValueError(
            f"`{name}` is {value!r}. Write the text to look for, such as '### Response:\\n', or leave it out."
        )
    return value if value is None else value.replace("\\n", "\n").replace("\\t", "\t")


def _require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}. It can be one of {', '.join(map(repr, choices))}.")


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and value == value
        and abs(value) != float("inf")
    )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def layer_list(name: str, value: Any) -> Any:
    """
    Layers as they were written, made sure of.

    Args:
        name: of the option.
        value: None, a word of `LAYER_WORDS`, one index or a list of them; as text, from the command line, as well.

    Returns:
        None, the word, or a list of indices.
    """
    words = LAYER_WORDS[name]
    if value is None or value in [*words, *([word] for word in words)]:
        return value[0] if isinstance(value, list) else value
    items = list(value) if isinstance(value, list | tuple | range) else [value]
    try:
        indices = [int(item) if isinstance(item, str) else item for item in items]
    except ValueError:
        indices = []
    if not indices or not all(_is_integer(index) for index in indices):
        meanings = "; ".join(f"{word!r}: {meaning}" for word, meaning in words.items())
        raise ValueError(
            f"`{name}` is {value!r}. Write a list of layer indices, such as [4, 5, 6, 7] or [-8, -7, -6, -5] "
            f"(negative counts from the end), or one of these words ({meanings}), or leave it out."
        )
    if len(set(indices)) != len(indices):
        raise ValueError(f"`{name}` names a layer twice: {indices}. Name each layer once.")
    return indices
