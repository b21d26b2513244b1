"""Is the echo pass exact for this model, kernel, layout and version? Measured on the user's own model, not looked up.

Shapes: B rows, T tokens, F = B*T; n tokens of a tiny row; E positions the echo reaches; d hidden size; L layers.

With a delta of zero the echo pass *is* the plain pass. So before the first step both are run on a few rows, in
evaluation mode and without gradients, and what comes out is compared:

- *states*: final hidden states at the reached positions, echo pass (delta = 0) against plain pass. Once with every
  document of the rows routed and once with the shortest only, so that nothing hangs on what else is in a pass.
- *logits*: our head against the model's own forward, on a tiny batch.
- *order*: on that tiny batch a changed last token must not move an earlier state; a model that sees both ways cannot
  be trained on answers by either trainer.

*What is allowed.* Both passes compute the same numbers in another order, so they differ by rounding. With unit
roundoff u (half the machine epsilon of the coarsest dtype at work: 6e-8 for float32, 5e-4 for tf32 and float16,
4e-3 for bfloat16) each layer rounds its residual stream by a relative error of at most u, and the model carries it on.
How far it carries it is measured: the plain pass runs once more with the output of each layer multiplied by 1 + u or
1 - u at random, which moves the final states by some relative distance r (root mean square over positions). That is
one rounding in each layer of one pass; a layer makes about 16 in sequence (norm, projection, attention, output, sum;
twice), independent ones add as a square root, and two passes are compared: sqrt(16 * 2) r = 5.7 r. Allowed are 8 r,
and never less than 8 u, since r is a sample. (Measured on 93 families in float32: 0 to 1.4 r.) A mixture of experts,
where rounding may send a token to another expert, gets the wider bound that it needs in the same way. Where autocast
makes float32 weights coarse, the passes are compared without it as well, with the tight bound of float32, unless the
kernels know no float32.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .compat.cache import CacheObserver, NoCacheError
from .head import with_head
from .layouts import EchoForm
from .losses import NonFiniteLossError
from .memory import is_out_of_memory
from .network import site_key
from .passes import EchoSetup, PlainState, run_echo_pass, run_plain_pass
from .plan import EchoPlan
from .rounding import relative, run_with_rounding, unit_roundoff
from .rows import take_rows

SAFETY = 8
"""Allowed difference as a multiple of what one rounding per layer does (see above)."""
CHANCE = 1000
"""Two plain passes that differ by more than this multiple of the unit roundoff do not differ by rounding."""


class RandomModelError(ValueError):
    """The model computes something else each time it is asked."""


@dataclass(frozen=True)
class ProofTask:
    """
    What a proof compares.

    Attributes:
        form: of the echo pass.
        plans: echo passes of the batch, laid out in `form`, on the model's device.
        tiny_ids: int64 (2, n), two rows that differ in the last token only.
        alone_n: int64 (n,), positions in F of a document that is not the first of its row; None where there is none.
    """

    form: EchoForm
    plans: tuple[EchoPlan, ...]
    tiny_ids: Tensor
    alone_n: Tensor | None = None


@dataclass(frozen=True)
class ProofResult:
    """
    What a proof measured. Differences are relative, root mean squares over positions.

    Attributes:
        states, allowed: difference of the final states of the two passes, and what rounding explains.
        logits, logits_allowed: the same for our head and the model's own.
        sees_ahead: difference of earlier states after a later token changed.
        mixes: difference of a packed document's states from those it has alone; None where it was not looked at.
        error: why the echo pass could not be run, None where it could.
    """

    logits: float
    logits_allowed: float
    sees_ahead: float
    allowed: float
    states: float = 0.0
    mixes: float | None = None
    error: str | None = None

    @property
    def agrees(self) -> bool:
        """Whether the echo pass ran and is the plain pass."""
        return self.error is None and self.states <= self.allowed

    @property
    def head_agrees(self) -> bool:
        """Whether our logits are the model's."""
        return self.logits <= self.logits_allowed


@torch.no_grad()
def prove(setup: EchoSetup, inputs: dict[str, Any], task: ProofTask) -> ProofResult:
    """
    Compare the passes; called inside the wrapped forward, so that engines, autocast and kernels take part.

    Args:
        setup: the model in evaluation mode and its echo parts; `setup.cache` is found on the way.
        inputs: keyword arguments of the backbone.
        task: what to compare.

    Raises:
        torch.OutOfMemoryError: there is no memory for the passes.
    """
    no_cache, sees_ahead, dtype = observe(setup, task.tiny_ids)
    roundoff = unit_roundoff(setup, dtype)
    measured = {
        "logits": compare_heads(setup, task.tiny_ids),
        "logits_allowed": SAFETY * roundoff,
        "sees_ahead": sees_ahead,
    }
    if task.form is EchoForm.SUFFIX and no_cache is not None:
        return ProofResult(**measured, allowed=SAFETY * roundoff, error=no_cache)
    found = [_compare(setup, inputs, task, roundoff)]
    if found[0]["error"] is None and (exact := _without_autocast(setup, inputs, task)) is not None:
        found.append(exact)
    return ProofResult(**measured, **max(found, key=lambda f: (f["error"] is not None, f["states"] / f["allowed"])))


def _compare(setup: EchoSetup, inputs: dict[str, Any], task: ProofTask, roundoff: float) -> dict[str, Any]:
    """The fields of a `ProofResult` that compare states."""
    rounded = run_with_rounding(setup, inputs, roundoff)
    hidden_BTd = setup.backbone(**inputs, use_cache=False).last_hidden_state
    states, error = 0.0, None
    for plan in task.plans:
        try:
            plain = run_plain_pass(setup, inputs, plan)
            again = relative(plain.hidden_Nd, take_rows(hidden_BTd, plan.predict_N))
            if again > CHANCE * roundoff:
                raise RandomModelError(f"two plain passes differ by {again:.1e}, so the model draws random numbers")
            states = max(states, _compare_passes(setup, inputs, plan, plain))
        except Exception as reason:
            if is_out_of_memory(reason):
                raise
            error = _in_a_line(reason)
            break
    return {
        "states": states,
        "allowed": SAFETY * max(relative(rounded, hidden_BTd), roundoff),
        "mixes": None if task.alone_n is None else _alone(setup, inputs, hidden_BTd, task.alone_n),
        "error": error,
    }


def _without_autocast(setup: EchoSetup, inputs: dict[str, Any], task: ProofTask) -> dict[str, Any] | None:
    """What `_compare` finds in float32; None where there is no autocast, or no float32 below it."""
    device = setup.model.device.type
    if not torch.is_autocast_enabled(device):
        return None
    with torch.autocast(device, enabled=False):
        try:
            hidden_BTd = setup.backbone(**inputs, use_cache=False).last_hidden_state
        except Exception as reason:
            if is_out_of_memory(reason):
                raise
            return None  # flash attention computes in half precision only
        roundoff = unit_roundoff(setup, hidden_BTd.dtype)
        if roundoff > torch.finfo(torch.float32).eps:
            return None
        return _compare(setup, inputs, task, roundoff)


def observe(setup: EchoSetup, tiny_ids: Tensor) -> tuple[str | None, float, torch.dtype]:
    """
    Run the tiny batch with a cache of the model's own, and see where it goes.

    Raises:
        NonFiniteLossError: the states are NaN or infinite.

    Returns:
        Why there can be no suffix pass (None where there can: `setup.cache` is then set), how far the earlier states
        of a row moved when its last token changed, and the dtype of the states.
    """
    observer = CacheObserver(setup.layers)
    backbone = setup.backbone
    setup.cache, why = None, None
    try:
        with observer.watching():
            outputs = backbone(input_ids=tiny_ids, use_cache=True)
        setup.cache = observer.place(backbone, outputs)
    except NoCacheError as error:
        why = str(error)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        why = f"{type(backbone).__name__} does not run with a cache of its own: {_in_a_line(error)}"
        outputs = backbone(input_ids=tiny_ids, use_cache=False)
    if not torch.isfinite(outputs.last_hidden_state).all():
        raise NonFiniteLossError(
            f"The states of {type(setup.model).__name__} are NaN or infinite before the first step, without any echo: "
            f"weights of the base or of the adapter are damaged, or overflow in {outputs.last_hidden_state.dtype}. No "
            f"weight was changed. Load them anew, or use bf16 or float32 instead of fp16."
        )
    one, other = outputs.last_hidden_state[:, :-1]
    return why, relative(one, other), one.dtype


def compare_heads(setup: EchoSetup, tiny_ids: Tensor) -> float:
    """Relative difference of our logits and the model's own on the tiny batch."""
    outputs = setup.backbone(input_ids=tiny_ids, use_cache=False)
    own = setup.model(input_ids=tiny_ids, use_cache=False).logits
    hidden_Nd = outputs.last_hidden_state.flatten(0, 1)
    ours = with_head(setup.model, setup.backbone, outputs, lambda head: head.logits(hidden_Nd))
    return relative(ours, own.reshape(ours.shape))


def _compare_passes(setup: EchoSetup, inputs: dict[str, Any], plan: EchoPlan, plain: PlainState) -> float:
    """Relative difference of the final states of the echo pass with zero delta and of the plain pass."""
    n_segments, device = len(plan.boundary_G), plan.boundary_G.device
    delta = {site_key(s): torch.zeros(n_segments, s.out_features, device=device) for s in setup.sites}
    echo_Ed, _ = run_echo_pass(setup, inputs, plan, plain, delta)
    if plan.weightless:  # a process that has nothing to compare keeps the others company
        return 0.0
    return relative(echo_Ed, plain.hidden_Nd.index_select(0, plan.reach_E))


def _alone(setup: EchoSetup, inputs: dict[str, Any], hidden_BTd: Tensor, alone_n: Tensor) -> float:
    """How far the states of a packed document are from those it has in a row of its own."""
    ids = inputs["input_ids"].reshape(-1)[alone_n]
    states = setup.backbone(input_ids=ids[None], use_cache=False).last_hidden_state
    return relative(states[0], take_rows(hidden_BTd, alone_n))


def _in_a_line(error: Exception) -> str:
    """An error as a part of a sentence."""
    words = str(error).splitlines()[0].rstrip(".") if str(error) else "no reason given"
    return words if isinstance(error, NoCacheError | RandomModelError) else f"{type(error).__name__}: {words}"
