"""Is the echo pass exact for this model, kernel, layout and version? Measured on the user's own model, not looked up.

Shapes: B rows, T tokens, F = B*T; n tokens of a tiny row; E positions the echo reaches; d hidden size.

With a delta of zero the echo pass *is* the plain pass. So before the first step both are run on a few rows, in
evaluation mode and without gradients, and what comes out is compared:

- *states*: final hidden states at the reached positions, echo pass (delta = 0) against plain pass. Once with every
  document of the rows routed and once with the shortest only, so that nothing hangs on what else is in a pass.
- *logits*: our head against the model's own forward, on a tiny batch.
- *order*: on that tiny batch a changed last token must not move an earlier state; a model that sees both ways cannot
  be trained on answers by either trainer.
- *documents*: where rows hold several, one of them must have the states that it has alone.

*What is allowed.* Both passes compute the same numbers in another order, so they differ by rounding. With unit
roundoff u (half the machine epsilon of the coarsest dtype at work: 6e-8 for float32, 5e-4 for tf32 and float16,
4e-3 for bfloat16) each layer rounds its residual stream by a relative error of at most u, and the model carries it on.
How far it carries it is measured: the plain pass runs once more with the output of each layer multiplied by 1 + u or
1 - u at random, which moves the compared states by some relative distance r (root mean square over positions). That is
one rounding in each layer of one pass; a layer makes about 16 in sequence (norm, projection, attention, output, sum;
twice), independent ones add as a square root, and two passes are compared: sqrt(16 * 2) r = 5.7 r. Allowed are 8 r,
and never less than 8 u, since r is a sample. (Measured on 150 families in float32: 0 to 1.4 r.)

In bfloat16 this bound is so wide (0.1 to 1) that it would pass real errors. So where computation is coarse the passes
are compared a second time in float32: without autocast where the weights are float32, else with one layer at a time
made float32. Where that cannot be done (quantised or sharded weights, kernels that know no float32) the bound is what
two right computations of the same states were seen to differ by: 4 times the distance e between a document's states
alone and in its row, and at least 8 u.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..compat.cache import CacheObserver, NoCacheError
from ..method.forms import EchoForm
from ..method.losses import NonFiniteLossError
from ..method.plan import EchoPlan
from ..method.rows import take_rows
from ..method.sites import site_key
from .echo import run_echo_pass
from .memory import is_out_of_memory
from .own_forward import compare_heads, own_forward
from .plain import run_plain_pass
from .rounding import (
    can_refine,
    echo_states,
    layers_in_float32,
    plain_states,
    relative,
    rounding,
    unit_roundoff,
)
from .setup import EchoSetup

SAFETY = 8
"""Allowed difference as a multiple of what one rounding per layer does (see above)."""
COARSE = 1e-5
"""Unit roundoff above which the passes are compared in float32 as well."""
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
        first_n: int64 (n,), positions in F of a document that is the first of its row.
        later_n: int64 (n,), those of one that is not; None where there is none.
    """

    form: EchoForm
    plans: tuple[EchoPlan, ...]
    tiny_ids: Int[Tensor, "2 _"]
    first_n: Int[Tensor, "_"]
    later_n: Int[Tensor, "_"] | None = None


@dataclass(frozen=True)
class ProofResult:
    """
    What a proof measured. Differences are relative, root mean squares over positions.

    Attributes:
        states, allowed: difference of the final states of the two passes, and what rounding explains.
        compared: positions at which they were compared.
        logits, logits_allowed: the same for our head and the model's own.
        sees_ahead: difference of earlier states after a later token changed.
        mixes: difference of a packed document's states from those it has alone; None where no row holds several.
        error: why the echo pass could not be run, None where it could.
    """

    logits: float
    logits_allowed: float
    sees_ahead: float
    allowed: float
    states: float = 0.0
    compared: int = 0
    mixes: float | None = None
    error: str | None = None

    @property
    def agrees(self) -> bool:
        """Whether the echo pass ran and is the plain pass."""
        return self.error is None and self.states <= self.allowed < float("inf")

    @property
    def head_agrees(self) -> bool:
        """Whether our logits are the model's."""
        return self.logits <= self.logits_allowed

    @property
    def mixes_documents(self) -> bool:
        """Whether packed documents see each other in the model itself."""
        return self.mixes is not None and self.mixes > self.allowed


@torch.no_grad()
def prove(setup: EchoSetup, inputs: dict[str, Any], task: ProofTask) -> ProofResult:
    """
    Compare the passes; called inside the wrapped forward, so that engines, autocast and kernels take part.

    Args:
        setup: the model in evaluation mode and its echo parts; `setup.cache` is found on the way.
        inputs: keyword arguments of the backbone.
        task: what to compare.

    Raises:
        NonFiniteLossError: the model's own states are NaN or infinite.
        UnusableModelError: the model's own forward fails.
        torch.OutOfMemoryError: there is no memory for the passes.
    """
    no_cache, sees_ahead, dtype = observe(setup, task.tiny_ids)
    roundoff = unit_roundoff(setup.model.parameters(), setup.model.device, dtype)
    measured: dict[str, Any] = {
        "logits": compare_heads(setup, task.tiny_ids),
        "logits_allowed": SAFETY * roundoff,
        "sees_ahead": sees_ahead,
    }
    if task.form.runs_suffixes and no_cache is not None:
        return ProofResult(**measured, allowed=SAFETY * roundoff, error=no_cache)
    found = _compare(setup, inputs, task, roundoff)
    if roundoff > COARSE and found["error"] is None:
        fine = _compare_finely(setup, inputs, task)
        if fine is None:
            e = _alone(setup, inputs, task.first_n)
            found["allowed"] = min(found["allowed"], max(4 * e, SAFETY * roundoff))
        else:
            found = max(found, fine, key=lambda f: (f["error"] is not None, f["states"] / f["allowed"]))
            found["mixes"] = fine["mixes"]
    return ProofResult(**measured, **found)


def _compare(
    setup: EchoSetup, inputs: dict[str, Any], task: ProofTask, roundoff: float, finals: list[Tensor] | None = None
) -> dict[str, Any]:
    """The fields of a `ProofResult` that compare states; those before the final norm where `finals` collects them."""
    states, compared, noise, error = 0.0, 0, 0.0, None
    hidden_BTd = _plain_states(setup, inputs, finals)
    with rounding(setup.layers, roundoff):
        rounded_BTd = _plain_states(setup, inputs, finals)
    for plan in task.plans:
        at_E = plan.predict_N.index_select(0, plan.reach_E)
        expected_Ed = take_rows(hidden_BTd, at_E)
        if not torch.isfinite(expected_Ed).all():
            raise _not_finite(setup, hidden_BTd.dtype)
        noise = max(noise, relative(take_rows(rounded_BTd, at_E), expected_Ed))
        try:
            plain = run_plain_pass(setup, inputs, plan)
            again_Ed = take_rows(
                plain.outputs.last_hidden_state if finals is None else plain_states(finals, inputs), at_E
            )
            again = relative(again_Ed, expected_Ed)
            if again > CHANCE * roundoff:
                raise RandomModelError(f"two plain passes differ by {again:.1e}, so the model draws random numbers")
            delta = {
                site_key(s): torch.zeros(len(plan.boundary_G), s.out_features, device=plan.boundary_G.device)
                for s in setup.sites
            }
            echo_Ed, _ = run_echo_pass(setup, inputs, plan, plain, delta)
            setup.unneeded = getattr(plain.prefix, "unneeded", setup.unneeded)
            if finals is not None:
                echo_Ed = echo_states(finals, inputs, plan)
        except Exception as reason:
            if is_out_of_memory(reason):
                raise
            error = _in_a_line(reason)
            break
        if not plan.weightless:  # else a process that has nothing to compare keeps the others company
            states, compared = max(states, relative(echo_Ed, expected_Ed)), compared + len(at_E)
    return {
        "states": states,
        "compared": compared,
        "allowed": SAFETY * max(noise, roundoff),
        "mixes": None if task.later_n is None else _alone(setup, inputs, task.later_n, finals),
        "error": error,
    }


def _compare_finely(setup: EchoSetup, inputs: dict[str, Any], task: ProofTask) -> dict[str, Any] | None:
    """What `_compare` finds in float32; None where the model cannot be computed in it."""
    model, roundoff = setup.model, torch.finfo(torch.float32).eps / 2
    device = model.device.type
    try:
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                dtype = _plain_states(setup, inputs).dtype
                if unit_roundoff(model.parameters(), model.device, dtype) <= COARSE:
                    return _without_errors(_compare(setup, inputs, task, roundoff))
        if not can_refine(setup):
            return None
        with torch.autocast(device, enabled=False), layers_in_float32(setup) as finals:
            return _without_errors(_compare(setup, inputs, task, roundoff, finals))
    except NonFiniteLossError:
        raise
    except Exception:  # flash attention knows half precision only; a layer may be too large to be made float32
        return None


def _without_errors(found: dict[str, Any]) -> dict[str, Any] | None:
    """A finding, None where the pass runs in its own dtype and not in float32."""
    return None if found["error"] is not None else found


def observe(setup: EchoSetup, tiny_ids: Int[Tensor, "2 n"]) -> tuple[str | None, float, torch.dtype]:
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
        outputs = own_forward(backbone, tiny_ids)
    if not torch.isfinite(outputs.last_hidden_state).all():
        raise _not_finite(setup, outputs.last_hidden_state.dtype)
    one, other = outputs.last_hidden_state[:, :-1]
    return why, relative(one, other), one.dtype


def _plain_states(
    setup: EchoSetup, inputs: dict[str, Any], finals: list[Tensor] | None = None
) -> Float[Tensor, "B T d"]:
    """Final states (B, T, d) of the plain pass."""
    hidden_BTd = setup.backbone(**inputs, use_cache=False).last_hidden_state
    return hidden_BTd if finals is None else plain_states(finals, inputs)


def _alone(
    setup: EchoSetup, inputs: dict[str, Any], at_n: Int[Tensor, "n"], finals: list[Tensor] | None = None
) -> float:
    """How far the states of a document in its row are from those it has in a row of its own."""
    hidden_BTd = _plain_states(setup, inputs, finals)
    alone = {"input_ids": inputs["input_ids"].reshape(-1)[at_n][None]}
    return relative(_plain_states(setup, alone, finals)[0], take_rows(hidden_BTd, at_n))


def _not_finite(setup: EchoSetup, dtype: torch.dtype) -> NonFiniteLossError:
    return NonFiniteLossError(
        f"The states of {type(setup.model).__name__} are NaN or infinite before the first step, without any echo: "
        f"weights of the base or of the adapter are damaged, or overflow in {dtype}. No weight was changed. Load them "
        f"anew, or use bf16 or float32 instead of fp16."
    )


def _in_a_line(error: Exception) -> str:
    """An error as a part of a sentence."""
    words = str(error).splitlines()[0].rstrip(".") if str(error) else "no reason given"
    return words if isinstance(error, NoCacheError | RandomModelError) else f"{type(error).__name__}: {words}"
