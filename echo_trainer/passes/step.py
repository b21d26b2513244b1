"""One training step as one forward of the wrapped model: plain pass, echo pass, losses.

Everything happens inside a single call of the PeftModel's `forward`, so autocast, DDP, FSDP2 and DeepSpeed see one
forward a step, whatever the step does inside.
"""

import functools
import inspect
import types
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ..method.losses import EchoLoss, Scalar, chunked_objective
from ..method.plan import EchoPlan
from ..method.silence import touch
from .echo import run_echo_pass
from .head import LanguageModelHead, with_head
from .memory import now_running
from .plain import run_plain_pass
from .proof import ProofTask, prove
from .score import ScoreTask, score_passes
from .setup import EchoSetup

ECHO_MODULE = "echo_networks"


def install_echo_forward(model: nn.Module, setup: EchoSetup, terms: EchoLoss) -> None:
    """
    Teach `model(...)` three keywords: with `echo_plan` the forward is a whole Echo-LoRA step, with `echo_proof` it
    compares the passes (see `proof.py`), with `echo_score` it says how well both predict (see `score.py`).

    Must run before `accelerator.prepare`, which wraps the forward it finds. Without a keyword the forward is the
    original one, so evaluation and generation are those of the plain adapter.
    """
    if getattr(model.forward, "echo_of", None) == (
        setup,
        terms,
    ):  # from here on, or below what accelerate wrapped it in
        return
    own, original = vars(model).get("forward"), model.forward

    @functools.wraps(original)
    def forward(
        self,
        *args,
        echo_plan: EchoPlan | None = None,
        echo_proof: ProofTask | None = None,
        echo_score: ScoreTask | None = None,
        **kwargs,
    ):
        if echo_proof is not None:
            return prove(setup, kwargs, echo_proof)
        if echo_score is not None:
            return score_passes(setup, kwargs, echo_score)
        if echo_plan is not None:
            return echo_step(setup, terms, kwargs, echo_plan)
        return original(*args, **kwargs)

    installed: Any = forward
    installed.__signature__ = _with_self(inspect.signature(original))  # whoever reads it sees the original's
    # accelerate unwraps a model by following `__wrapped__`; it must stop here.
    del installed.__wrapped__
    installed.echo_of = (setup, terms)
    installed.echo_restores = (forward, own)
    model.forward = types.MethodType(installed, model)


def _with_self(signature: inspect.Signature) -> inspect.Signature:
    """That of the function of a bound method."""
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    return signature.replace(parameters=[itself, *signature.parameters.values()])


def remove_echo_forward(model: nn.Module) -> None:
    """
    Give a model back the forward it had.

    What accelerate has wrapped for mixed precision stays, as `SFTTrainer` leaves it; nobody gives it a keyword.
    """
    forward = vars(model).get("forward")
    installed, before = getattr(forward, "echo_restores", (None, None))
    if installed is None or getattr(forward, "__func__", None) is not installed:
        return
    del model.forward
    if before is not None:
        model.forward = before


def attach_networks(model: nn.Module, networks: nn.Module) -> None:
    """Make the echo networks a part of the model, at its root, where optimizers and distributed engines find them."""
    setattr(model, ECHO_MODULE, networks)


def has_networks(model: nn.Module) -> bool:
    """Whether echo networks are part of the model now."""
    return hasattr(model, ECHO_MODULE)


def detach_networks(model: nn.Module) -> None:
    """Take the echo networks off the model, so that it is the plain adapted model again."""
    if has_networks(model):
        delattr(model, ECHO_MODULE)


def echo_step(setup: EchoSetup, terms: EchoLoss, inputs: dict[str, Any], plan: EchoPlan) -> dict[str, Scalar]:
    """
    Plain pass, echo pass and losses of one micro-batch.

    Args:
        setup: the model and its echo parts.
        terms: what the echo pass adds to the loss, and what it weighs.
        inputs: keyword arguments of the backbone (no labels; the plan holds them).
        plan: the plan of the batch, on the device of the inputs.

    Returns:
        "objective" (sum over answer tokens, with gradient), the fields of [`losses.Statistics`] (sums), "gate" and
        "relative_delta" (means), and "aux_loss" for a mixture of experts.
    """
    plain = run_plain_pass(setup, inputs, plan)
    echo_Ed, gate, relative_delta = None, None, None
    if plan.layout is not None:
        now_running("echo pass")
        delta, gate = setup.networks(plain.source_SGd, weightless=plan.weightless)
        echo_Ed, injection = run_echo_pass(setup, inputs, plan, plain, delta)
        relative_delta = injection.mean_relative_delta().to(plan.boundary_G.device)
    now_running("loss")

    def loss(head: LanguageModelHead):
        objective = chunked_objective(
            plain.hidden_Nd,
            None if plan.weightless else echo_Ed,
            plan.labels_N,
            plan.plain_weight_N,
            plan.reach_E,
            plan.reach_host_E,
            head,
            terms,
        )
        return *objective, _router_loss(head, plain.hidden_Nd, inputs)

    objective, statistics, aux_loss = with_head(setup.model, setup.backbone, plain.outputs, loss)
    # A model split over devices ends on another one than its inputs, the plan and the echo networks are on.
    device = inputs["input_ids"].device
    objective = objective.to(device)
    if echo_Ed is None:
        # A step that routes nothing still has to give every parameter a gradient: DDP waits for each of them.
        objective = objective + touch(*setup.networks.parameters())
    elif plan.weightless:
        objective = objective + touch(echo_Ed).to(device)
    zero = objective.detach().new_zeros(())
    output = {
        "objective": objective,
        **{name: value.to(device) for name, value in statistics._asdict().items()},
        "gate": zero if gate is None else gate,
        "relative_delta": zero if relative_delta is None else relative_delta,
    }
    if aux_loss is not None:
        output["aux_loss"] = aux_loss.to(device)
    return output


def _router_loss(head: LanguageModelHead, hidden_Nd: Float[Tensor, "N d"], inputs: dict[str, Any]) -> Scalar | None:
    """Load-balancing loss of a mixture of experts on the plain pass, as the model's own forward computes it."""
    if not inputs.get("output_router_logits"):
        return None
    few = hidden_Nd[:1].detach()  # any state does: the loss is made of what the routers said
    return head.run(few, output_router_logits=True, attention_mask=inputs.get("attention_mask")).aux_loss
