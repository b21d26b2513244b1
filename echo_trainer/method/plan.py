"""The plan of one step: every index that the two passes and the losses need, made on the host from the labels.

Because the plan is made where the labels are (in the collator, on the CPU), the device never has to tell the host a
shape, so a step needs no synchronisation.

Shapes: F = B*T positions of the batch, N positions that predict an answer token, G routed segments, E of the N that
the echo can reach; in the echo pass R rows of A tokens, J positions that receive an echo.

*Reach.* Attention is causal, so the echo changes nothing before the first position it is added to. The positions of a
routed sample that come earlier (with `echo_positions="answer"`: the one that predicts the first answer token) have the
same logits in both passes; their CE_echo is CE_plain and their KD is zero. They are not computed twice, they count
twice: `plain_weight_N` is 1 + r_i there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .forms import EchoForm, Layout, Picks, Reach
from .indices import Indices
from .layouts import SuffixLayout, first_two
from .segments import Segments, numbered_spans


@dataclass(frozen=True)
class EchoPlan(Indices):
    """
    Everything a step with an echo has to know about its batch.

    Attributes:
        predict_N: int64 (N,), positions in F that predict an answer token.
        labels_N: int64 (N,), the tokens they predict.
        plain_weight_N: float32 (N,), how often CE_plain counts: 1, or 1 + r_i where the echo cannot reach.
        reach_E: int64 (E,), indices into N of the routed positions that the echo can reach, increasing.
        reach_host_E: the same, which stay on the host.
        boundary_G: int64 (G,), positions in F of the boundary of each routed segment.
        form: how the echo pass is computed.
        layout: what it runs. None where nothing is to run (E = 0), unless `lockstep`.
        probability: p_k.
        n_samples, n_routed, n_unroutable: documents with an answer, those routed, those without a boundary.
        n_routed_tokens: answer tokens of routed documents, reached or not.
        n_tokens: tokens of the batch, padding aside.
        lockstep: whether every process runs an echo pass for each micro-batch (see `method/silence.py`).
    """

    predict_N: Int[Tensor, "N"]
    labels_N: Int[Tensor, "N"]
    plain_weight_N: Float[Tensor, "N"]
    reach_E: Int[Tensor, "E"]
    reach_host_E: Int[np.ndarray, "E"]
    boundary_G: Int[Tensor, "G"]
    form: EchoForm
    layout: Layout | None
    probability: float
    n_samples: int
    n_routed: int
    n_unroutable: int
    n_routed_tokens: int
    n_tokens: int
    lockstep: bool = False

    @property
    def suffixes(self) -> SuffixLayout | None:
        """The layout where it is one of suffixes, which read keys and values of the plain pass."""
        return self.layout if isinstance(self.layout, SuffixLayout) else None

    @property
    def n_parts(self) -> int:
        """Number of passes over suffixes; 0 where the layout is none of suffixes."""
        return len(self.suffixes.parts) if self.suffixes is not None else 0

    @property
    def weightless(self) -> bool:
        """Whether an echo pass runs for no other reason than that other processes run one."""
        return self.layout is not None and not len(self.reach_E)

    def without_echo(self) -> "EchoPlan":
        """The plan of the plain loss alone, for a step whose echo cannot be used."""
        return replace(
            self,
            plain_weight_N=torch.ones_like(self.plain_weight_N),
            reach_E=self.reach_E[:0],
            reach_host_E=self.reach_host_E[:0],
            layout=self.layout if self.lockstep else None,
            n_routed=0,
            n_routed_tokens=0,
        )


def make_plan(
    segments: Segments,
    routed: Sequence[bool] | Bool[np.ndarray, "D"],
    *,
    form: EchoForm,
    positions: str = "answer",
    position_ids: Int[Tensor, "rows T"] | None = None,
    probability: float = 0.0,
    lockstep: bool = False,
    images: Sequence[int] = (),
    picks: Picks | None = None,
    n_parts: int | None = None,
) -> EchoPlan:
    """
    Turn segments and routing decisions into the indices of a step.

    Args:
        segments: the answers of the batch.
        routed: r_i of every document; documents without a boundary are never routed, whatever it says.
        form: how the echo pass is laid out.
        positions: "answer" or "predicting" (see `EchoSFTConfig.echo_positions`).
        position_ids: (1, T) or (B, T) position ids of the batch; None where they are column numbers.
        probability: p_k, kept for logging.
        lockstep: lay out an echo pass in any case; one of no weight where nothing is routed.
        images: of each row, where rows are run without the others; see `full_layout`.
        picks: what some rows own of inputs that are not text, likewise; None where there are none.
        n_parts: number of passes of a pass over suffixes; None for the cheapest.
    """
    routed_D = torch.from_numpy(np.array(routed, dtype=bool)) & segments.routable_D
    routed_S = routed_D[segments.document_S]
    boundary_G = segments.boundary_S[routed_S]
    begin_G = segments.start_S[routed_S] if positions == "answer" else boundary_G
    inject_F = numbered_spans(segments.n_positions, begin_G, segments.end_S[routed_S])
    # One more for padding, which is no document.
    first_D = torch.full((segments.n_documents + 1,), segments.n_positions)
    first_D.scatter_reduce_(0, segments.document_S[routed_S], begin_G, "amin")

    predict_N = segments.predict_N
    routed_N = torch.cat([routed_D, routed_D.new_zeros(1)])[segments.document_N]
    reached_N = routed_N & predict_N.ge(first_D[segments.document_N])
    reach_E = reached_N.nonzero().flatten()
    layout = None
    if len(reach_E) or lockstep:
        reached = predict_N[reach_E]
        layout = form.lay_out(Reach(segments, inject_F, first_D[:-1], reached, position_ids, images, picks, n_parts))
        if not len(reach_E):
            boundary_G = torch.tensor([first_two(segments)[0]])
    answered_D = segments.answered_D
    return EchoPlan(
        predict_N=predict_N,
        labels_N=segments.labels_N,
        plain_weight_N=1.0 + (routed_N & ~reached_N).float(),
        reach_E=reach_E,
        reach_host_E=reach_E.numpy(),
        boundary_G=boundary_G,
        form=form,
        layout=layout,
        probability=probability,
        n_samples=int(answered_D.sum()),
        n_routed=int(routed_D.sum()),
        n_unroutable=int((answered_D & ~segments.routable_D).sum()),
        n_routed_tokens=int(routed_N.sum()),
        n_tokens=int((segments.end_D - segments.start_D).sum()),
        lockstep=lockstep,
    )
