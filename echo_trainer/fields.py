"""The options of Echo-LoRA as dataclass fields; `config.py` joins them to those of `trl.SFTConfig`."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from .method.aggregation import AGGREGATIONS
from .options import (
    CARD_PROMPTS,
    GATES,
    LOSSES,
    MEMORIES,
    POSITIONS,
    PRESETS,
    TEACHERS,
    WHEN_USELESS,
    WithoutTokens,
)
from .passes.echo import AUTO, pass_options

OF_THE_PRESET: Any = None
"""Default of the options that `echo_preset` fills: after the config is made they have a value."""

if TYPE_CHECKING:
    Text = str
    Number = float
    Flag = bool
    Sources = list[int] | Literal["depth", "cka", "above"] | None
    Targets = list[int] | Literal["depth", "cka", "lowest"] | None
else:
    Text = str | None
    Number = float | None
    Flag = bool | None
    Sources = Targets = list[str] | None  # for the command line, whose parser takes one type; see `options.layer_list`


def _said(meanings: dict[str, str]) -> str:
    """Values of an option, each with what it means."""
    return ", ".join(f"{value!r} ({meaning})" for value, meaning in meanings.items())


@dataclass
class EchoFields(WithoutTokens):
    """See [`EchoSFTConfig`], which has the table of symbols, units and ranges."""

    echo_preset: str = field(
        default="paper",
        metadata={
            "help": "Where options of the echo that are not set get their values from: 'paper' (the paper's reading), "
            "or 'strong' (an echo that is on: no gate, scale from 1, z with its graph, lowest adapted layer and the "
            "one above, every sample routed, loss divided by the weight of its cross-entropies).",
            "choices": list(PRESETS),
        },
    )
    echo_source_layers: Sources = field(
        default=None,
        metadata={
            "nargs": "*",
            "help": "Source layers S: decoder layers whose hidden states at the prompt/answer boundary make the echo. "
            "Zero-based, negative counts from the end. 'depth': about 0.75 to 0.88 of the depth. 'cka': the most "
            "important deep layers by CKA on the training data. 'above': the layer just above the targets. None: the "
            "preset's; 'depth' for 'paper', 'above' for 'strong'.",
        },
    )
    echo_target_layers: Targets = field(
        default=None,
        metadata={
            "nargs": "*",
            "help": "Target layers M: decoder layers whose LoRA modules receive the echo. All must lie below every "
            "source layer. 'depth': about 0.13 to 0.25 of the depth (of the adapted layers, where those have no "
            "adapter). 'cka': the most important shallow layers by CKA. 'lowest': the lowest layer with an adapter. "
            "None: the preset's; 'depth' for 'paper', 'lowest' for 'strong'.",
        },
    )
    echo_bottleneck: int = field(
        default=64, metadata={"help": "Width of the hidden layer of the projection and gate networks, in features."}
    )
    echo_gate: Text = field(
        default=OF_THE_PRESET,
        metadata={
            "help": "Gate g of the echo: 'sigmoid', or 'none' (delta = lambda_m e). None: the preset's; 'sigmoid' for "
            "'paper', 'none' for 'strong'.",
            "choices": list(GATES),
        },
    )
    echo_gate_bias: float = field(
        default=-2.0, metadata={"help": "Start value of the gate's bias b_g; the gate starts near sigmoid of it."}
    )
    echo_scale: Number = field(
        default=OF_THE_PRESET,
        metadata={
            "help": "Start value of the learned scale lambda_m, > 0. None: the preset's; 0.1 for 'paper', 1.0 for "
            "'strong'."
        },
    )
    echo_detach: Flag = field(
        default=OF_THE_PRESET,
        metadata={
            "help": "Whether the echo z is taken without its gradient. False: what the echo pass needs reaches the "
            "adapters below the source layers through z. None: the preset's; True for 'paper', False for 'strong'."
        },
    )
    echo_aggregation: str = field(
        default="mean",
        metadata={
            "help": "How the source layers are combined into the echo z: "
            + _said({name: aggregation.says for name, aggregation in AGGREGATIONS.items()})
            + ".",
            "choices": list(AGGREGATIONS),
        },
    )
    echo_positions: str = field(
        default="answer",
        metadata={
            "help": "Where the echo is added: 'answer' (positions that hold answer tokens) or 'predicting' (also the "
            "last prompt token, which predicts the first answer token).",
            "choices": list(POSITIONS),
        },
    )
    echo_p_start: float = field(
        default=1.0, metadata={"help": "Routing probability p at the first optimizer step, in [0, 1]."}
    )
    echo_p_end: Number = field(
        default=OF_THE_PRESET,
        metadata={
            "help": "Routing probability p at the last optimizer step, in [0, 1]. p is linear. None: the preset's; "
            "0.2 for 'paper', 1.0 for 'strong'."
        },
    )
    echo_loss: Text = field(
        default=OF_THE_PRESET,
        metadata={
            "help": "What a routed sample weighs: 'sum' (CE_plain + CE_echo + lambda_kd KD: its cross-entropy counts "
            "twice), or 'mean' (half of that sum: it counts as every other sample does). None: the preset's; 'sum' "
            "for 'paper', 'mean' for 'strong'.",
            "choices": list(LOSSES),
        },
    )
    echo_kd_weight: float = field(default=1.0, metadata={"help": "Weight lambda_kd of the masked distillation, >= 0."})
    echo_kd_temperature: float = field(
        default=2.0, metadata={"help": "Temperature tau of the masked distillation, > 0."}
    )
    echo_teacher: str = field(
        default="echo",
        metadata={
            "help": "Which distribution teaches: 'echo' (the plain path learns from the echo pass), 'plain' (the "
            "other way round) or 'mutual' (both terms are added). The teacher never gets a gradient.",
            "choices": list(TEACHERS),
        },
    )
    echo_pass: str = field(
        default="auto",
        metadata={
            "help": "How the echo pass is computed: "
            + _said(pass_options())
            + ", 'auto' (the first of them that a comparison with the plain pass at the first step proves exact).",
            "choices": [AUTO, *pass_options()],
        },
    )
    echo_memory: str = field(
        default="auto",
        metadata={
            "help": "What the suffix pass keeps for backward: 'store' (what it computes, and the prompts' keys and "
            "values), 'recompute' (the inputs of its layers; the rest is computed again, which takes some time), "
            "'auto' (recompute under gradient checkpointing where much would be kept).",
            "choices": list(MEMORIES),
        },
    )
    echo_layers: str | None = field(
        default=None,
        metadata={
            "help": "Dotted name of the list of decoder layers in the model, such as 'model.layers', for a model in "
            "which they cannot be found."
        },
    )
    echo_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the echo networks, > 0. None: `learning_rate`."}
    )
    echo_seed: int | None = field(
        default=None,
        metadata={"help": "Seed of the routing and of the echo networks' initialisation, >= 0. None: `seed`."},
    )

    echo_probation: float = field(
        default=0.1,
        metadata={
            "help": "When the echo is judged on held-out rows (an `eval_dataset`, or `echo_held_out`): a share of the "
            "run below 1 (50 steps at least), a number of steps, or 0 for never."
        },
    )
    echo_held_out: int = field(
        default=0,
        metadata={
            "help": "Training rows that are set aside to judge the echo on where there is no `eval_dataset`. Nothing "
            "is trained on them."
        },
    )
    echo_when_useless: str = field(
        default="say",
        metadata={
            "help": "What follows when the echo pass predicts held-out answers no better than the plain pass, or as "
            "well with the echo of another sample: 'say' (one line), or 'stop' (as well, and plain LoRA from there "
            "on; judge later, or on more rows, where either is not clear yet).",
            "choices": list(WHEN_USELESS),
        },
    )

    assistant_only_loss: bool | None = field(
        default=None,
        metadata={
            "nargs": "?",
            "const": True,
            "help": "Whether the answers of a conversation are the assistant's turns. None: yes where the rows are "
            "conversations without a completion. False cannot work with the echo for such rows.",
        },
    )
    answer_marker: str | None = field(
        default=None,
        metadata={
            "help": "What stands before each answer in rows of text and in what a formatting_func writes, such as "
            "'### Response:\\n': the text before it is the prompt. None: the words by which the chat template asks "
            "for an answer, where it wrote the text. \\n and \\t are read as a new line and a tab."
        },
    )
    prompt_marker: str | None = field(
        default=None,
        metadata={
            "help": "What stands before each prompt, such as '### Instruction:\\n'; says where an answer ends in a "
            "text of several turns. An end token does so as well."
        },
    )
    drop_without_marker: bool = field(
        default=False,
        metadata={
            "help": "Drop texts that do not hold the answer marker with an answer after it; else they are an error."
        },
    )

    frozen_prefix_cache: bool = field(
        default=False,
        metadata={
            "help": "Where upper layers alone are adapted: run the layers below the first trained one once for each "
            "document, and keep its states in host memory (hidden size x tokens numbers, up to half of what is free)."
        },
    )

    portable_adapter: bool = field(
        default=True,
        metadata={
            "help": "Write the final adapter in the form that every serving engine reads correctly (one rank, one "
            "scale, every layer; the same function up to rounding). False keeps the trained form. Checkpoints always "
            "keep it."
        },
    )
    card_prompt: str = field(
        default="format",
        metadata={
            "help": "What the model card and `echo_run.json` show of the prompts: 'format' (what all of them share, "
            "such as templates and a system prompt; nothing of a single example), 'example' (the first training "
            "example as well) or 'none'.",
            "choices": list(CARD_PROMPTS),
        },
    )
