"""The full echo pass: whole rows again, from the embedding on.

Shapes: R rows of the batch, E positions that the echo reaches, d hidden size.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ..method.forms import EchoForm
from ..method.layouts import FullLayout, full_layout
from ..method.network import Delta
from ..method.plan import EchoPlan
from ..method.rows import take_rows
from .injection import Injection, Places
from .plain import PlainState
from .setup import EchoSetup

# Inputs whose rows are the batch's rows. What else a batch may hold is picked by what it means (`FullLayout.picks`).
ROW_INPUTS = {"input_ids", "attention_mask", "position_ids"}


def run_rows(
    setup: EchoSetup, inputs: dict[str, Any], plan: EchoPlan, plain: PlainState, delta: Delta
) -> tuple[Float[Tensor, "E d"], Injection]:
    """Run the rows that hold routed samples again, from the embedding on; see `EchoPass`."""
    layout = plan.layout
    assert isinstance(layout, FullLayout)
    if layout.row_R is not None:
        rows = {k: v.index_select(0, layout.row_R) for k, v in by_row(inputs).items()}
        parts = {k: inputs[k].index_select(pick.axis, pick.index) for k, pick in layout.picks.items()}
        inputs = {**inputs, **rows, **parts}
    n_positions = inputs["input_ids"].numel()
    injection = Injection(setup.sites, delta)
    with injection.active(setup.layers, Places(layout, n_positions)):
        outputs = setup.backbone(**inputs, use_cache=False)
    return take_rows(outputs.last_hidden_state, layout.output_position_E), injection


def by_row(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The inputs that hold one row for each row of the batch; position ids may be one row for all."""
    rows = inputs["input_ids"].shape[0]
    return {k: v for k, v in inputs.items() if k in ROW_INPUTS and isinstance(v, Tensor) and v.shape[0] == rows}


ROWS = EchoForm(
    name="full",
    option="full",
    says="the whole sequence again",
    lay_out=full_layout,
    run=run_rows,
    lighter="echo_pass='auto' with attention 'sdpa', which runs answers only",
    instead="runs whole sequences from here on (about twice the price of LoRA), since the cheaper one",
    picks_rows=True,
)
"""The rows that hold a routed document."""

BATCH = replace(
    ROWS,
    name="full (whole batches)",
    lay_out=partial(full_layout, all_rows=True),
    picks_rows=False,
    repeats_plain=True,
)
"""Every row, where an input belongs to no row, or to several."""
