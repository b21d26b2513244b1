"""The ways to compute the echo pass, as a table, and what all of them have in common.

Shapes: E positions that the echo reaches, G routed segments, o_m output size of module m, d hidden size.
"""

from typing import Any, Protocol

from jaxtyping import Float
from torch import Tensor

from ..method.forms import EchoForm
from ..method.network import Delta
from ..method.plan import EchoPlan
from .full import BATCH, ROWS
from .injection import Injection
from .plain import PlainState
from .setup import EchoSetup
from .suffix import RECOMPUTED, SUFFIX

FORMS = {form.name: form for form in (RECOMPUTED, SUFFIX, ROWS, BATCH)}
"""The cheapest first: with `echo_pass="auto"` the first one that is proved exact runs."""

AUTO = "auto"


class EchoPass(Protocol):
    """`EchoForm.run`: final hidden states (E, d) of the echo-augmented model at the positions the echo reaches."""

    def __call__(
        self, setup: EchoSetup, inputs: dict[str, Any], plan: EchoPlan, plain: PlainState, delta: Delta
    ) -> tuple[Float[Tensor, "E d"], Injection]:
        """Run what `plan.layout` holds; `delta` is delta_m (G, o_m) by `site_key`."""
        ...


def run_echo_pass(
    setup: EchoSetup, inputs: dict[str, Any], plan: EchoPlan, plain: PlainState, delta: Delta
) -> tuple[Float[Tensor, "E d"], Injection]:
    """The echo pass in the form that the plan is laid out for."""
    return plan.form.run(setup, inputs, plan, plain, delta)


def pass_options() -> dict[str, str]:
    """Values of `echo_pass` but "auto", with what they run."""
    return {form.option: form.says for form in FORMS.values()}


def forms_for(option: str, recompute: bool = False) -> tuple[EchoForm, ...]:
    """
    The forms that may run with a value of `echo_pass`, the one that is tried first at the beginning.

    Args:
        option: "auto", or one of `pass_options`.
        recompute: whether a form may compute again in backward what it would keep.
    """
    forms = [form for form in FORMS.values() if form.option == option or (option == AUTO and form.automatic)]
    return tuple(form for form in forms if recompute or not form.recomputes)


def form_named(name: str) -> EchoForm:
    """The form that a record or a checkpoint names; ValueError where there is none."""
    if name not in FORMS:
        raise ValueError(
            f"There is no form {name!r} of the echo pass; there are {', '.join(map(repr, FORMS))}. What names it was "
            f"written by another version of echo_trainer: go on with that one."
        )
    return FORMS[name]
