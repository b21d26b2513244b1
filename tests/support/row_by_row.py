"""An echo pass as somebody would add it: one file, and a line in `passes.echo.FORMS`. Rows run one after the other."""

from dataclasses import dataclass, replace

import torch

from echo_trainer.method.forms import EchoForm, Work
from echo_trainer.method.indices import Indices
from echo_trainer.method.layouts import FullLayout, full_layout
from echo_trainer.passes.full import by_row
from echo_trainer.passes.injection import Injection, Places


@dataclass(frozen=True)
class SingleRows(Indices):
    """Some rows of a batch, each a batch of its own."""

    rows: tuple[FullLayout, ...]
    order_E: None = None

    def outputs(self, shape):
        return [((1, shape[1]), row.output_position_E) for row in self.rows]

    def work(self, shape, mask=None):
        works = [row.work(shape, mask) for row in self.rows]
        tokens, real, pairs = (sum(getattr(work, name) for work in works) for name in ("tokens", "real", "pairs"))
        return Work(tokens, real, pairs, runs=len(works))

    def words(self):
        return f"runs {len(self.rows)} rows again, one after the other"


def single_rows(reach):
    whole = full_layout(replace(reach, picks=None))
    rows = torch.arange(reach.segments.shape[0]) if whole.row_R is None else whole.row_R
    length = reach.segments.shape[1]
    found = []
    for number, row in enumerate(rows.tolist()):

        def here(position, number=number):
            return position.div(length, rounding_mode="floor").eq(number)

        inject, output = here(whole.inject_position_J), here(whole.output_position_E)
        found.append(
            FullLayout(
                inject_position_J=whole.inject_position_J[inject] % length,
                inject_segment_J=whole.inject_segment_J[inject],
                output_position_E=whole.output_position_E[output] % length,
                row_R=torch.tensor([row]),
                picks={} if reach.picks is None else reach.picks([row]),
            )
        )
    return SingleRows(tuple(found))


def run_single_rows(setup, inputs, plan, plain, delta):
    injection, hidden = Injection(setup.sites, delta), []
    for row in plan.layout.rows:
        own = {name: value.index_select(0, row.row_R) for name, value in by_row(inputs).items()}
        own |= {name: inputs[name].index_select(pick.axis, pick.index) for name, pick in row.picks.items()}
        with injection.active(setup.layers, Places(row, inputs["input_ids"].shape[1])):
            outputs = setup.backbone(**{**inputs, **own}, use_cache=False)
        hidden.append(outputs.last_hidden_state[0, row.output_position_E])
    return torch.cat(hidden), injection


ROW_BY_ROW = EchoForm(
    name="row by row",
    option="single",
    says="one row after the other",
    lay_out=single_rows,
    run=run_single_rows,
    lighter="a smaller max_length",
    automatic=False,
    picks_rows=True,
)
