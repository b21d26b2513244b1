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

import torch
from torch import Tensor

from .layouts import EchoForm, Indices, Layout, SuffixLayout, full_layout
from .segments import Segments
from .suffixes import suffix_layout, weightless_layout


@dataclass(frozen=True)
class EchoPlan(Indices):
    """
    Everything a step with an echo has to know about its batch.

    Attributes:
        predict_N: int64 (N,), positions in F that predict an answer token.
        labels_N: int64 (N,), the tokens they predict.
        plain_weight_N: float32 (N,), how often CE_plain counts: 1, or 1 + r_i where the echo cannot reach.
        reach_E: int64 (E,), indices into N of the routed positions that the echo can reach.
        boundary_G: int64 (G,), positions in F of the boundary of each routed segment.
        layout: what the echo pass runs. None where nothing is to run (E = 0), unless `lockstep`.
        probability: p_k.
        n_samples, n_routed, n_unroutable: documents with an answer, those routed, those without a boundary.
        n_routed_tokens: answer tokens of routed documents, reached or not.
        lockstep: whether every process runs an echo pass for each micro-batch (see `method/silence.py`).
    """

    predict_N: Tensor
    labels_N: Tensor
    plain_weight_N: Tensor
    reach_E: Tensor
    boundary_G: Tensor
    layout: Layout | None
    probability: float
    n_samples: int
    n_routed: int
    n_unroutable: int
    n_routed_tokens: int
    lockstep: bool = False

    @property
    def n_parts(self) -> int:
        """Number of passes over suffixes; 0 where the layout is none of suffixes."""
        return len(self.layout.parts) if isinstance(self.layout, SuffixLayout) else 0

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
            layout=self.layout if self.lockstep else None,
            n_routed=0,
            n_routed_tokens=0,
        )


def make_plan(
    segments: Segments,
    routed_D: Sequence[bool],
    *,
    positions: str = "answer",
    form: EchoForm = EchoForm.ROWS,
    position_ids: Tensor | None = None,
    probability: float = 0.0,
    lockstep: bool = False,
    n_parts: int | None = None,
) -> EchoPlan:
    """
    Turn segments and routing decisions into the indices of a step.

    Args:
        segments: the answers of the batch.
        routed_D: r_i of every document; documents without a boundary are never routed, whatever it says.
        positions: "answer" or "predicting" (see `EchoSFTConfig.echo_positions`).
        form: how the echo pass is laid out.
        position_ids: (1, T) or (B, T) position ids of the batch; None where they are column numbers.
        probability: p_k, kept for logging.
        lockstep: lay out an echo pass in any case; one of no weight where nothing is routed.
        n_parts: number of passes of a pass over suffixes; None for the cheapest.
    """
    routed_D = torch.as_tensor(list(routed_D), dtype=torch.bool) & segments.routable_D
    predict_N = segments.predict_F.nonzero().flatten()
    document_N = segments.document_F[predict_N]
    routed_segment_S = routed_D[segments.document_S]
    number_S = routed_segment_S.cumsum(0) - 1

    inject_F = _injections(segments, routed_segment_S, number_S, positions)
    inject_position = inject_F.ge(0).nonzero().flatten()
    first_D = torch.full((segments.n_documents,), segments.labels_F.numel())
    first_D.scatter_reduce_(0, segments.document_F[inject_position], inject_position, "amin")

    routed_N = routed_D[document_N]
    reached_N = routed_N & predict_N.ge(first_D[document_N])
    reach_E = reached_N.nonzero().flatten()
    boundary_G = segments.boundary_S[routed_segment_S]
    layout = None
    if len(reach_E):
        reached = predict_N[reach_E]
        if form is EchoForm.SUFFIX:
            layout = suffix_layout(segments, inject_F, first_D, reached, position_ids, n_parts)
        else:
            layout = full_layout(segments, inject_F, reached, position_ids, all_rows=form is EchoForm.BATCH)
    elif lockstep:
        layout, boundary_G = weightless_layout(segments, form, position_ids, n_parts)
    answered_D = segments.answered_D
    return EchoPlan(
        predict_N=predict_N,
        labels_N=segments.labels_F[predict_N],
        plain_weight_N=1.0 + (routed_N & ~reached_N).float(),
        reach_E=reach_E,
        boundary_G=boundary_G,
        layout=layout,
        probability=probability,
        n_samples=int(answered_D.sum()),
        n_routed=int(routed_D.sum()),
        n_unroutable=int((answered_D & ~segments.routable_D).sum()),
        n_routed_tokens=int(routed_N.sum()),
        lockstep=lockstep,
    )


def _injections(segments: Segments, routed_S: Tensor, number_S: Tensor, positions: str) -> Tensor:
    """Routed segment whose echo is added at each position, -1 where none, (F,)."""
    inject_F = torch.full_like(segments.segment_F, -1)
    answer = segments.segment_F.ge(0).nonzero().flatten()
    segment = segments.segment_F[answer]
    keep = routed_S[segment]
    inject_F[answer[keep]] = number_S[segment[keep]]
    if positions == "predicting":
        inject_F[segments.boundary_S[routed_S]] = number_S[routed_S]
    return inject_F
