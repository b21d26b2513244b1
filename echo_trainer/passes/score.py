"""Cross-entropies of both passes position by position, without a gradient: how good a teacher the echo is.

Shapes: N positions that predict an answer token, E of them that the echo reaches, G routed segments, S source layers,
d hidden size, V vocabulary, K tokens that are kept of it.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..method.losses import CHUNK_LOGITS, cross_entropy
from ..method.plan import EchoPlan
from ..method.soft_labels import most_likely
from .echo import run_echo_pass
from .head import LanguageModelHead, with_head
from .plain import PlainState, run_plain_pass
from .setup import EchoSetup


class Scores(NamedTuple):
    """
    What the passes say at the positions of a plan.

    Attributes:
        ce_plain_N, ce_echo_N: cross-entropies in nats; the same number where the echo does not reach.
        top_plain_N, top_echo_N: whether the token is the most likely one.
        ce_other_N: CE_echo with the echoes of others; None where nobody asked.
        source_SGd: what the echoes were made of; None where no echo pass ran.
    """

    ce_plain_N: Float[Tensor, "N"]
    ce_echo_N: Float[Tensor, "N"]
    top_plain_N: Bool[Tensor, "N"]
    top_echo_N: Bool[Tensor, "N"]
    ce_other_N: Float[Tensor, "N"] | None
    source_SGd: Float[Tensor, "S G d"] | None


@dataclass(frozen=True)
class ScoreTask:
    """
    What is to be scored.

    Attributes:
        plan: of the batch, on the model's device.
        partner_G: int64 (G,), for one more echo pass: whose echo each segment is given in place of its own. None:
            no such pass. G stands for the segment of `lent_Sd`.
        lent_Sd: states of the source layers (S, d) at the boundary of a segment of another batch.
    """

    plan: EchoPlan
    partner_G: Int[Tensor, "G"] | None = None
    lent_Sd: Float[Tensor, "S d"] | None = None


@torch.no_grad()
def score_passes(setup: EchoSetup, inputs: dict[str, Any], task: ScoreTask) -> Scores:
    """
    Run both passes on a batch, and the echo pass again with the echoes of others where that is asked for.

    Args:
        setup: the model, in evaluation mode, and its echo parts.
        inputs: keyword arguments of the backbone, without labels.
        task: what is to be scored.
    """
    plan = task.plan
    plain, echo_Ed = _run(setup, inputs, plan)
    other_Ed = None
    if task.partner_G is not None and plan.layout is not None:
        assert plain.source_SGd is not None  # there is a pass that adds it
        echoes = plain.source_SGd if task.lent_Sd is None else torch.cat([plain.source_SGd, task.lent_Sd[:, None]], 1)
        delta, _ = setup.networks(echoes.index_select(1, task.partner_G), weightless=plan.weightless)
        other_Ed, _ = run_echo_pass(setup, inputs, plan, plain, delta)

    def score(head: LanguageModelHead) -> Scores:
        ce_plain_N, top_plain_N = _score(head, plain.hidden_Nd, plan.labels_N)

        def with_echo(hidden_Ed: Tensor | None) -> tuple[Tensor, Tensor]:
            ce_N, top_N = ce_plain_N.clone(), top_plain_N.clone()
            if hidden_Ed is not None and not plan.weightless:
                reached = _score(head, hidden_Ed, plan.labels_N.index_select(0, plan.reach_E))
                ce_N[plan.reach_E], top_N[plan.reach_E] = reached
            return ce_N, top_N

        ce_echo_N, top_echo_N = with_echo(echo_Ed)
        ce_other_N = with_echo(other_Ed)[0] if task.partner_G is not None else None
        return Scores(ce_plain_N, ce_echo_N, top_plain_N, top_echo_N, ce_other_N, plain.source_SGd)

    return with_head(setup.model, setup.backbone, plain.outputs, score)


class Reading(NamedTuple):
    """
    What the pass of a teacher says at the positions of a plan: the echo pass where it reaches, else the plain one.

    Attributes:
        ce_N: cross-entropies in nats.
        top_NK: the K most likely tokens, the most likely first.
        log_NK1: their log-probabilities at the temperature that was asked for, and that of all other tokens together.
    """

    ce_N: Float[Tensor, "N"]
    top_NK: Int[Tensor, "N K"]
    log_NK1: Float[Tensor, "N K1"]


@torch.no_grad()
def read_distributions(
    setup: EchoSetup, inputs: dict[str, Any], plan: EchoPlan, top: int, temperature: float
) -> Reading:
    """
    Cross-entropies of a teacher, and its distributions over the most likely tokens.

    Args:
        setup, inputs: as for `score_passes`.
        plan: of the batch, on the model's device.
        top: K, at most V - 1; 0 for none.
        temperature: that the logits are divided by.
    """
    plain, echo_Ed = _run(setup, inputs, plan)
    hidden_Nd = plain.hidden_Nd
    if echo_Ed is not None and not plan.weightless:
        hidden_Nd = hidden_Nd.index_copy(0, plan.reach_E, echo_Ed.to(hidden_Nd.dtype))

    def read(head: LanguageModelHead) -> Reading:
        count = min(top, head.vocabulary - 1)
        chunk = max(1, CHUNK_LOGITS // head.vocabulary)
        parts = []
        for start in range(0, len(plan.labels_N), chunk):
            span = slice(start, start + chunk)
            logits_NV = head.logits(hidden_Nd[span])
            parts.append((cross_entropy(logits_NV, plan.labels_N[span]), *most_likely(logits_NV, count, temperature)))
        return Reading(*(torch.cat(part) for part in zip(*parts, strict=True)))

    return with_head(setup.model, setup.backbone, plain.outputs, read)


def _run(setup: EchoSetup, inputs: dict[str, Any], plan: EchoPlan) -> tuple[PlainState, Tensor | None]:
    """The plain pass, and hidden states of the echo pass (E, d) where one runs."""
    plain = run_plain_pass(setup, inputs, plan)
    if plan.layout is None:
        return plain, None
    delta, _ = setup.networks(plain.source_SGd, weightless=plan.weightless)
    echo_Ed, _ = run_echo_pass(setup, inputs, plan, plain, delta)
    return plain, echo_Ed


def _score(
    head: LanguageModelHead, hidden_Nd: Float[Tensor, "N d"], labels_N: Int[Tensor, "N"]
) -> tuple[Float[Tensor, "N"], Bool[Tensor, "N"]]:
    """Cross-entropy (N,) and whether the label is the most likely token (N,), a chunk of positions at a time."""
    chunk = max(1, CHUNK_LOGITS // head.vocabulary)
    ce, top = [hidden_Nd.new_zeros(0, dtype=torch.float32)], [labels_N.new_zeros(0, dtype=torch.bool)]
    for start in range(0, len(labels_N), chunk):
        span = slice(start, start + chunk)
        logits_NV = head.logits(hidden_Nd[span])
        ce.append(cross_entropy(logits_NV, labels_N[span]))
        top.append(logits_NV.argmax(-1).eq(labels_N[span]))
    return torch.cat(ce), torch.cat(top)
