"""The echo pass in its two forms behind one interface.

Shapes: E positions that the echo reaches, G routed segments, o_m output size of module m, d hidden size.
"""

from typing import Any, Protocol

from jaxtyping import Float
from torch import Tensor

from ..method.layouts import SuffixLayout
from ..method.network import Delta
from ..method.plan import EchoPlan
from .full import FullEchoPass
from .injection import Injection
from .plain import PlainState
from .setup import EchoSetup
from .suffix import SuffixEchoPass


class EchoPass(Protocol):
    """An echo pass: final hidden states (E, d) of the echo-augmented model at the positions the echo reaches."""

    def __call__(
        self, setup: EchoSetup, inputs: dict[str, Any], plan: EchoPlan, plain: PlainState, delta: Delta
    ) -> tuple[Float[Tensor, "E d"], Injection]:
        """Run the pass; `delta` holds delta_m (G, o_m) by `site_key`."""
        ...


def run_echo_pass(
    setup: EchoSetup, inputs: dict[str, Any], plan: EchoPlan, plain: PlainState, delta: Delta
) -> tuple[Float[Tensor, "E d"], Injection]:
    """The echo pass in the form that the plan is laid out for."""
    echo_pass: EchoPass = SuffixEchoPass() if isinstance(plan.layout, SuffixLayout) else FullEchoPass()
    return echo_pass(setup, inputs, plan, plain, delta)
