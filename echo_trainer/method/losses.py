"""Cross-entropy of both passes and masked distillation, in chunks of positions (steps 4, 5 and 7 of the method).

Shapes: N positions that predict an answer token, E of them that the echo reaches, V vocabulary, d hidden size.

    objective = sum_n w_n CE(plain_n) + sum_e w_e [ CE(echo_e) + lambda_kd KD_e ]
    KD = tau^2 KL(teacher || student) at temperature tau, the teacher without gradient

Weights: with "sum" w_e = 1, and w_n = 1, or 2 at positions of routed samples that the echo cannot reach, where
CE_plain is CE_echo. With "mean" the terms of a routed sample are halved: w_e = 1/2, and w_n = 1/2 where the echo
reaches, 1 elsewhere. So every position has a cross-entropy of weight 1, and an echo of zero gives the loss of plain
LoRA.

The sums are not divided by N here; the trainer divides by the answer tokens of the global batch.

Pure functions of logits define the loss. `chunked_objective` applies them to hidden states chunk by chunk and keeps
only the gradient with respect to the hidden states, so at no time do more than `CHUNK_LOGITS` logits of a pass exist.
"""

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Scalar = Float[Tensor, ""]

CHUNK_LOGITS = 2**26
"""Logits of one pass that may exist at a time (256 MiB in float32)."""


class NonFiniteLossError(ArithmeticError):
    """The loss or its gradients are NaN or infinite, with a cause that another step cannot mend."""


@runtime_checkable
class Head(Protocol):
    """The language-model head as the loss needs it."""

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """Those of it that are trained."""
        ...

    @property
    def vocabulary(self) -> int:
        """V."""
        ...

    def logits(self, hidden_Nd: Float[Tensor, "N d"]) -> Float[Tensor, "N V"]:
        """Logits (N, V) for hidden states (N, d)."""
        ...


@dataclass(frozen=True)
class EchoLoss:
    """
    The terms of the objective that an echo pass adds, and what they weigh.

    Attributes:
        kd_weight: lambda_kd.
        temperature: tau.
        teacher: "echo", "plain" or "mutual".
        reduction: "sum" (the cross-entropy of a routed sample counts twice) or "mean" (once, as that of every other).
    """

    kd_weight: float
    temperature: float
    teacher: str
    reduction: str = "sum"

    @property
    def share(self) -> float:
        """w_e."""
        return 0.5 if self.reduction == "mean" else 1.0

    def plain_weights(self, plain_weight_N: Float[Tensor, "N"], reach_E: Int[Tensor, "E"]) -> Float[Tensor, "N"]:
        """w_n, (N,), from the plan's: 1, or 2 where a routed sample is out of reach."""
        if self.reduction == "sum":
            return plain_weight_N
        return torch.ones_like(plain_weight_N).index_fill(0, reach_E, self.share)


class Statistics(NamedTuple):
    """Sums over positions, without gradient; each a scalar."""

    ce_plain: Scalar
    entropy: Scalar
    correct: Scalar
    ce_plain_routed: Scalar
    ce_echo: Scalar
    kd: Scalar
    agreement: Scalar


def cross_entropy(logits_NV: Float[Tensor, "N V"], labels_N: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
    """Negative log-likelihood per position, (N,)."""
    return F.cross_entropy(logits_NV, labels_N, reduction="none")


def distillation(
    plain_EV: Float[Tensor, "E V"], echo_EV: Float[Tensor, "E V"], temperature: float, teacher: str
) -> Float[Tensor, "E"]:
    """
    KD per position, (E,): tau^2 KL(teacher || student), both softened by the temperature tau.

    Args:
        plain_EV, echo_EV: logits of the plain and of the echo pass at the same positions.
        temperature: tau.
        teacher: "echo", "plain", or "mutual" (both terms are added). A teacher gets no gradient.

    A token that the teacher rules out (a logit of -inf) adds nothing. One that the student alone rules out makes KD
    infinite.
    """

    def divergence(teacher_EV: Tensor, student_EV: Tensor) -> Tensor:
        teacher_log = F.log_softmax(teacher_EV.detach() / temperature, dim=-1)
        student_log = F.log_softmax(student_EV / temperature, dim=-1)
        p_EV = teacher_log.exp()
        difference = (teacher_log - student_log).masked_fill(p_EV == 0, 0.0)  # not 0 times (-inf - -inf)
        return temperature**2 * (p_EV * difference).sum(-1)

    if teacher == "echo":
        return divergence(echo_EV, plain_EV)
    if teacher == "plain":
        return divergence(plain_EV, echo_EV)
    return divergence(echo_EV, plain_EV) + divergence(plain_EV, echo_EV)


def chunked_objective(
    plain_Nd: Float[Tensor, "N d"],
    echo_Ed: Float[Tensor, "E d"] | None,
    labels_N: Int[Tensor, "N"],
    plain_weight_N: Float[Tensor, "N"],
    reach_E: Int[Tensor, "E"],
    reach_host_E: Int[np.ndarray, "E"],
    head: Head,
    terms: EchoLoss,
) -> tuple[Scalar, Statistics]:
    """
    The objective above and its statistics.

    Args:
        plain_Nd: final hidden states of the plain pass at the predicting positions.
        echo_Ed: those of the echo pass at the positions it reaches, None where no echo pass ran.
        labels_N: the tokens to predict.
        plain_weight_N: weight of CE_plain per position.
        reach_E: increasing indices into N of the positions of `echo_Ed`.
        reach_host_E: the same on the host, where they are cut into chunks.
        head: the language-model head.
        terms: what the echo pass adds, and what it weighs.

    Returns:
        The objective, a scalar of at least float32 with gradient, and statistics.
    """
    objective, *statistics = _ChunkedObjective.apply(
        plain_Nd, echo_Ed, labels_N, plain_weight_N, reach_E, reach_host_E, head, terms, *head.parameters
    )
    return objective, Statistics(*statistics)


class _ChunkedObjective(torch.autograd.Function):
    """
    Computes the gradient in forward, where the logits of a chunk exist, and scales it in backward.

    So each position is projected once and its gradient is projected back once: no logits are kept, none are computed
    twice.
    """

    @staticmethod
    def forward(ctx, plain_Nd, echo_Ed, labels_N, plain_weight_N, reach_E, reach_host_E, head, terms, *parameters):
        hidden = (plain_Nd, echo_Ed)
        # With a model split over devices the last of them computes the loss.
        labels_N, plain_weight_N, reach_E = (x.to(plain_Nd.device) for x in (labels_N, plain_weight_N, reach_E))
        gradients: list[Any] = [torch.zeros_like(x) if ctx.needs_input_grad[i] else None for i, x in enumerate(hidden)]
        # what is trained of the head sums over chunks, in at least float32
        of_head = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
        objective = plain_Nd.new_zeros((), dtype=torch.promote_types(plain_Nd.dtype, torch.float32))
        statistics = [objective.clone() for _ in Statistics._fields]
        chunk = max(1, CHUNK_LOGITS // head.vocabulary)
        reach = _split_reach(reach_host_E, len(labels_N), chunk) if echo_Ed is not None else None
        for number, start in enumerate(range(0, len(labels_N), chunk)):
            span_N = slice(start, min(start + chunk, len(labels_N)))
            span_E = reach[number] if reach is not None else slice(0, 0)
            leaves = [
                None if x is None else x[span].detach().requires_grad_(gradient is not None)
                for x, span, gradient in zip(hidden, (span_N, span_E), gradients, strict=True)
            ]
            with torch.enable_grad():
                loss, sums = _objective(
                    *leaves, labels_N[span_N], plain_weight_N[span_N], reach_E[span_E] - start, head, terms
                )
            used = [i for i, leaf in enumerate(leaves) if gradients[i] is not None and leaf is not None and len(leaf)]
            wanted = [*(leaves[i] for i in used), *parameters]
            found = torch.autograd.grad(loss, wanted, allow_unused=True) if wanted else ()
            for i, gradient in zip(used, found, strict=False):
                gradients[i][(span_N, span_E)[i]] = gradient
            for total, gradient in zip(of_head, found[len(used) :], strict=True):
                if gradient is not None:  # an adapter that is not the active one
                    total += gradient
            objective += loss.detach()
            statistics = [total + value for total, value in zip(statistics, sums, strict=True)]
        ctx.save_for_backward(*gradients, *of_head)
        ctx.dtypes = [None if x is None else x.dtype for x in (*hidden, *parameters)]
        ctx.mark_non_differentiable(*statistics)
        return objective, *statistics

    @staticmethod
    def backward(ctx, grad_objective, *_):
        gradients = [
            None if gradient is None else (gradient * grad_objective).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*gradients[:2], *[None] * 6, *gradients[2:])


def shown_as(objective: Scalar, shown: Scalar) -> Scalar:
    """
    The value of `shown` with the gradient of `objective`, both scalars; an objective that is not finite shows itself.

    What a loop logs as its loss is the value; what it trains on is the gradient.
    """
    return _ShownAs.apply(objective, shown)


class _ShownAs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, objective, shown):
        return torch.where(torch.isfinite(objective), shown, objective)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def _objective(
    plain_Nd: Float[Tensor, "N d"],
    echo_Ed: Float[Tensor, "E d"] | None,
    labels_N: Int[Tensor, "N"],
    plain_weight_N: Float[Tensor, "N"],
    reach_E: Int[Tensor, "E"],
    head: Head,
    terms: EchoLoss,
) -> tuple[Scalar, Statistics]:
    """Objective and statistics of one chunk, with its N and E."""
    plain_NV = head.logits(plain_Nd)
    ce_plain_N = cross_entropy(plain_NV, labels_N)
    loss = (terms.plain_weights(plain_weight_N, reach_E) * ce_plain_N).sum()
    with torch.no_grad():
        log_NV = F.log_softmax(plain_NV, dim=-1)
        p_NV = log_NV.exp()
        entropy = -(p_NV * log_NV.masked_fill(p_NV == 0, 0.0)).sum()
        top_N = plain_NV.argmax(-1)
        correct = top_N.eq(labels_N).float().sum()
        # Where the echo cannot reach, the plain terms are the terms of both passes.
        unreached = ((plain_weight_N - 1.0) * ce_plain_N).sum()
        agreement = (plain_weight_N - 1.0).sum()
        zero = torch.zeros_like(agreement)
    if echo_Ed is None or not len(echo_Ed):
        return loss, Statistics(ce_plain_N.detach().sum(), entropy, correct, unreached, unreached, zero, agreement)
    plain_EV = plain_NV.index_select(0, reach_E)
    echo_EV = head.logits(echo_Ed)
    ce_echo = cross_entropy(echo_EV, labels_N.index_select(0, reach_E)).sum()
    with torch.set_grad_enabled(terms.kd_weight > 0):  # logged in any case
        kd_sum = distillation(plain_EV, echo_EV, terms.temperature, terms.teacher).sum()
    loss = loss + terms.share * ce_echo + terms.share * terms.kd_weight * kd_sum
    with torch.no_grad():
        ce_plain_routed = unreached + ce_plain_N.index_select(0, reach_E).sum()
        agreement = agreement + echo_EV.argmax(-1).eq(top_N.index_select(0, reach_E)).float().sum()
    return loss, Statistics(
        ce_plain_N.detach().sum(),
        entropy,
        correct,
        ce_plain_routed,
        unreached + ce_echo.detach(),
        kd_sum.detach(),
        agreement,
    )


def _split_reach(reach_E: Int[np.ndarray, "E"], n: int, chunk: int) -> list[slice]:
    """The slice of E that falls into each chunk of N."""
    cuts = np.searchsorted(reach_E, [*range(0, n, chunk), n]).tolist()
    return [slice(a, b) for a, b in itertools.pairwise(cuts)]
