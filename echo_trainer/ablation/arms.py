"""The arms of the ablation: what each changes about the training of the recipe, and nothing else."""

from dataclasses import dataclass, field
from typing import Any

BASELINE = "lora"
_NO_ECHO = {"echo_p_start": 0.0, "echo_p_end": 0.0}
_STRONG = {"echo_preset": "strong"}


@dataclass(frozen=True)
class Arm:
    """
    One way to train.

    Attributes:
        name: as in recipes and reports.
        what: what it is, for the report.
        settings: fields of `EchoSFTConfig` it sets over the recipe.
        echo: which echo the networks see: "own", or "zero", "shuffled", "noise" (`echoes.py`).
        family: arms that share a choice of learning rate.
        flops_of: the arm whose counted FLOPs this one spends on more steps; None: the recipe's number of steps.
        length: factor on the recipe's number of steps.
        teacher: who answers prompts for a second training (`labels` of the recipe); None: there is none.
    """

    name: str
    what: str
    family: str
    settings: dict[str, Any] = field(default_factory=dict)
    echo: str = "own"
    flops_of: str | None = None
    length: float = 1.0
    teacher: str | None = None


_ARMS = (
    Arm(BASELINE, "LoRA, loss on the answer only", "lora", _NO_ECHO),
    Arm(
        "lora-unmasked",
        "LoRA, loss on prompt and answer",
        "lora-unmasked",
        {**_NO_ECHO, "completion_only_loss": False, "assistant_only_loss": False},
    ),
    Arm(
        "lora-compute-matched",
        "LoRA with as many more steps as the FLOPs of `echo` pay for",
        "lora",
        _NO_ECHO,
        flops_of="echo",
    ),
    Arm(
        "lora-longer",
        "LoRA with half as many steps again, its rate chosen at that length",
        "lora-longer",
        _NO_ECHO,
        length=1.5,
    ),
    Arm("echo", "Echo-LoRA as in the recipe", "echo"),
    Arm(
        "echo-zero",
        "z = 0: masking, routing and distillation without any injection. LN(0) = 0 makes delta zero, so both passes "
        "agree, KD is 0 and CE_echo is CE_plain: LoRA whose routed samples count twice (with dropout the passes "
        "differ by their dropout masks, and KD by that)",
        "echo",
        echo="zero",
    ),
    Arm(
        "echo-shuffled",
        "z of another routed sample of the batch; a sample routed alone gets no echo",
        "echo",
        echo="shuffled",
    ),
    Arm("echo-noise", "random z of the same norm", "echo", echo="noise"),
    Arm("echo-no-kd", "no distillation", "echo", {"echo_kd_weight": 0.0}),
    Arm("echo-no-routing", "every sample routed in every step", "echo", {"echo_p_start": 1.0, "echo_p_end": 1.0}),
    Arm(
        "echo-zero-no-routing",
        "z = 0 and every sample routed in every step: LoRA whose loss counts twice",
        "echo",
        {"echo_p_start": 1.0, "echo_p_end": 1.0},
        echo="zero",
    ),
    Arm("echo-teacher-plain", "the echo pass learns from the plain pass", "echo", {"echo_teacher": "plain"}),
    Arm("echo-mutual", "each pass learns from the other", "echo", {"echo_teacher": "mutual"}),
    Arm(
        "echo-predicting",
        "injection also at the last prompt token, which predicts the first answer token",
        "echo",
        {"echo_positions": "predicting"},
    ),
    Arm("strong", "Echo-LoRA with the preset `strong`", "strong", _STRONG),
    Arm("strong-third", "`strong` that begins with a third of its strength", "strong", _STRONG | {"echo_scale": 0.3}),
    Arm("strong-tenth", "`strong` that begins with a tenth of its strength", "strong", _STRONG | {"echo_scale": 0.1}),
    Arm(
        "strong-zero",
        "`strong` with z = 0: both passes agree and their loss counts once, so it is LoRA at the rate of `strong`",
        "strong",
        _STRONG,
        echo="zero",
    ),
    Arm("strong-shuffled", "`strong` with z of another routed sample", "strong", _STRONG, echo="shuffled"),
    Arm("strong-noise", "`strong` with random z of the same norm", "strong", _STRONG, echo="noise"),
    Arm(
        "lora-strong-matched",
        "LoRA with as many more steps as the FLOPs of `strong` pay for",
        "lora",
        _NO_ECHO,
        flops_of="strong",
    ),
    Arm(
        "strong-labels",
        "`strong`, then plain training on labelled rows and on prompts that its echo pass has answered",
        "strong",
        _STRONG,
        teacher="echo",
    ),
    Arm(
        "strong-plain-labels",
        "the same with the plain pass of the same weights as labeller",
        "strong",
        _STRONG,
        teacher="plain",
    ),
    Arm(
        "self-training",
        "`lora-longer`, then plain training on labelled rows and on prompts that it has answered itself",
        "lora-longer",
        _NO_ECHO,
        length=1.5,
        teacher="plain",
    ),
)
ARMS: dict[str, Arm] = {arm.name: arm for arm in _ARMS}
ADAPTERS = ("lora", "dora")


def find_arms(names: list[str]) -> list[Arm]:
    """
    Arms by name, in the order of the table above; those that an arm is measured against are added.

    Raises:
        ValueError: a name is unknown or given twice.
    """
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        raise ValueError(f"There is no arm {', '.join(map(repr, unknown))}. The arms are: {', '.join(ARMS)}.")
    if len(set(names)) != len(names):
        raise ValueError(f"An arm is named twice: {' '.join(names)}. Name each once.")
    wanted = {BASELINE, *names, *(ARMS[name].flops_of for name in names if ARMS[name].flops_of)}
    return [arm for arm in ARMS.values() if arm.name in wanted]
