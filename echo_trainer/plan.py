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
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .segments import Segments


@dataclass(frozen=True)
class _Indices:
    """A record of tensors (and records) that can be moved to a device in one call."""

    def to(self, device: torch.device | str):
        """The same record with every tensor on `device`."""
        moved = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor | _Indices):
                moved[item.name] = (
                    value.to(device, non_blocking=True) if isinstance(value, Tensor) else value.to(device)
                )
        return replace(self, **moved)


@dataclass(frozen=True)
class PassLayout(_Indices):
    """
    Which tokens the echo pass runs, where it adds the echo, and which of its outputs are used.

    Attributes:
        inject_position_J: int64 (J,), positions in the flattened (R, A) input of the pass that receive an echo.
        inject_segment_J: int64 (J,), routed segment (0 .. G-1) whose echo each of them receives.
        output_position_E: int64 (E,), positions in the flattened (R, A) output that predict an answer token.
    """

    inject_position_J: Tensor
    inject_segment_J: Tensor
    output_position_E: Tensor


@dataclass(frozen=True)
class FullLayout(PassLayout):
    """
    The echo pass runs whole rows of the batch again.

    Attributes:
        row_R: int64 (R,), rows of the batch that hold a routed sample.
    """

    row_R: Tensor

    def with_all_rows(self, length: int) -> "FullLayout":
        """The same layout for a pass that runs every row of `length` tokens (inputs that are not laid out by row)."""

        def move(position: Tensor) -> Tensor:
            return self.row_R[position // length] * length + position % length

        return replace(
            self,
            inject_position_J=move(self.inject_position_J),
            output_position_E=move(self.output_position_E),
        )


@dataclass(frozen=True)
class SuffixLayout(PassLayout):
    """
    The echo pass runs only what follows the first echo of each routed document, on keys and values of the plain pass.

    Documents become rows: P prefix positions, right-aligned so that a prefix ends where its suffix begins, then A
    suffix positions, left-aligned. That is the layout of a left-padded prompt with a cache, which every attention
    kernel and mask of transformers understands, sliding windows included.

    Attributes:
        token_RA: int64 (R, A), position in F of each suffix token (padding repeats a valid one).
        position_RA: int64 (R, A), position id of each suffix token.
        prefix_RP: int64 (R, P), position in F of each prefix token (padding repeats a valid one).
        mask_RK: int64 (R, P + A), 1 for real prefix and suffix tokens.
        real_token, real_prefix: int64, where the flattened `token_RA` and `prefix_RP` are not padding.
    """

    token_RA: Tensor
    position_RA: Tensor
    prefix_RP: Tensor
    mask_RK: Tensor
    real_token: Tensor
    real_prefix: Tensor


@dataclass(frozen=True)
class EchoPlan(_Indices):
    """
    Everything a step with an echo has to know about its batch.

    Attributes:
        predict_N: int64 (N,), positions in F that predict an answer token.
        labels_N: int64 (N,), the tokens they predict.
        plain_weight_N: float32 (N,), how often CE_plain counts: 1, or 1 + r_i where the echo cannot reach.
        reach_E: int64 (E,), indices into N of the routed positions that the echo can reach.
        boundary_G: int64 (G,), positions in F of the boundary of each routed segment.
        layout: what the echo pass runs, None where nothing is to run (E = 0).
        probability: p_k.
        n_samples, n_routed, n_unroutable: documents with an answer, those routed, those without a boundary.
        n_routed_tokens: answer tokens of routed documents, reached or not.
    """

    predict_N: Tensor
    labels_N: Tensor
    plain_weight_N: Tensor
    reach_E: Tensor
    boundary_G: Tensor
    layout: PassLayout | None
    probability: float
    n_samples: int
    n_routed: int
    n_unroutable: int
    n_routed_tokens: int


def make_plan(
    segments: Segments,
    routed_D: Sequence[bool],
    *,
    positions: str = "answer",
    suffix: bool = False,
    position_ids: Tensor | None = None,
    probability: float = 0.0,
) -> EchoPlan:
    """
    Turn segments and routing decisions into the indices of a step.

    Args:
        segments: the answers of the batch.
        routed_D: r_i of every document; documents without a boundary are never routed, whatever it says.
        positions: "answer" or "predicting" (see `EchoSFTConfig.echo_positions`).
        suffix: lay the echo pass out as a suffix pass.
        position_ids: (1, T) or (B, T) position ids of the batch; None where they are column numbers.
        probability: p_k, kept for logging.
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
    layout = None
    if len(reach_E):
        reached = predict_N[reach_E]
        if suffix:
            layout = _suffix_layout(segments, inject_F, first_D, reached, position_ids)
        else:
            layout = _full_layout(segments, inject_F, reached)
    answered_D = segments.answered_D
    return EchoPlan(
        predict_N=predict_N,
        labels_N=segments.labels_F[predict_N],
        plain_weight_N=1.0 + (routed_N & ~reached_N).float(),
        reach_E=reach_E,
        boundary_G=segments.boundary_S[routed_segment_S],
        layout=layout,
        probability=probability,
        n_samples=int(answered_D.sum()),
        n_routed=int(routed_D.sum()),
        n_unroutable=int((answered_D & ~segments.routable_D).sum()),
        n_routed_tokens=int(routed_N.sum()),
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


def _full_layout(segments: Segments, inject_F: Tensor, reached: Tensor) -> FullLayout:
    length = segments.shape[1]
    row_R = torch.unique(reached // length)
    new_row = torch.full((segments.shape[0],), -1)
    new_row[row_R] = torch.arange(len(row_R))
    inject = inject_F.ge(0).nonzero().flatten()
    inject = inject[new_row[inject // length].ge(0)]
    return FullLayout(
        row_R=row_R,
        inject_position_J=new_row[inject // length] * length + inject % length,
        inject_segment_J=inject_F[inject],
        output_position_E=new_row[reached // length] * length + reached % length,
    )


def _suffix_layout(
    segments: Segments, inject_F: Tensor, first_D: Tensor, reached: Tensor, position_ids: Tensor | None
) -> SuffixLayout:
    document_E = segments.document_F[reached]
    documents, row_E = torch.unique(document_E, return_inverse=True)
    begin_R = first_D[documents]
    # The last answer token predicts nothing, so a suffix ends at the last position that predicts.
    last_R = torch.zeros_like(begin_R).scatter_reduce_(0, row_E, reached, "amax")
    start_R = segments.start_D[documents]
    length_R = last_R - begin_R + 1
    prefix_R = begin_R - start_R

    offset_A = torch.arange(int(length_R.max()))
    token_RA = torch.minimum(begin_R[:, None] + offset_A, last_R[:, None])
    n_prefix = max(int(prefix_R.max()), 1)  # a zero-width cache is a special case for no kernel
    prefix_RP = torch.maximum(begin_R[:, None] - n_prefix + torch.arange(n_prefix), start_R[:, None])
    real_prefix_RP = torch.arange(n_prefix).ge(n_prefix - prefix_R[:, None])
    real_token_RA = offset_A.lt(length_R[:, None])
    inject_RA = inject_F[token_RA].masked_fill(~real_token_RA, -1).reshape(-1)
    inject = inject_RA.ge(0).nonzero().flatten()
    return SuffixLayout(
        token_RA=token_RA,
        position_RA=_position_ids(segments, position_ids)[token_RA],
        prefix_RP=prefix_RP,
        mask_RK=torch.cat([real_prefix_RP, real_token_RA], dim=1).long(),
        real_token=real_token_RA.reshape(-1).nonzero().flatten(),
        real_prefix=real_prefix_RP.reshape(-1).nonzero().flatten(),
        inject_position_J=inject,
        inject_segment_J=inject_RA[inject],
        output_position_E=row_E * len(offset_A) + reached - begin_R[row_E],
    )


def _position_ids(segments: Segments, position_ids: Tensor | None) -> Tensor:
    """Position id of every position of the flattened batch, (F,)."""
    if position_ids is not None:
        return position_ids.expand(segments.shape).reshape(-1)
    return torch.arange(segments.shape[1]).repeat(segments.shape[0])


def starts_at_column_zero(segments: Segments) -> bool:
    """Whether every row's document starts at its first column, so that position ids are column numbers."""
    return bool((segments.start_D % segments.shape[1]).eq(0).all())
