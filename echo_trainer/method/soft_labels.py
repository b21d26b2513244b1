"""A teacher's distributions as labels: the K most likely tokens of each position, and all others as one.

Shapes: N positions, V vocabulary, K tokens that are kept.

    KD_n = tau^2 sum_c t_c (log t_c - log s_c),   c: the K tokens, and the rest as one class

t and s are the distributions of teacher and student at temperature tau, summed over each class. Merging tokens makes a
divergence smaller and never negative, and with K = V - 1 nothing is merged: the KD of `losses.distillation`.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

TOP_TOKENS, TOP_LOGS = "teacher_tokens", "teacher_logs"
"""Columns of a row, each a list for each token with a label; in batches tensors (B, A, K) and (B, A, K + 1)."""


def most_likely(
    logits_NV: Float[Tensor, "N V"], count: int, temperature: float
) -> tuple[Int[Tensor, "N K"], Float[Tensor, "N K1"]]:
    """
    The K most likely tokens (N, K), and log-probabilities of these and of the rest (N, K + 1), at a temperature.

    Args:
        logits_NV: of a teacher.
        count: K, below V.
        temperature: tau.
    """
    top_NK = logits_NV.topk(count, dim=-1).indices
    return top_NK, _by_class(logits_NV, top_NK, temperature)


def soft_distillation(
    logits_NV: Float[Tensor, "N V"], top_NK: Int[Tensor, "N K"], log_NK1: Float[Tensor, "N K1"], temperature: float
) -> Float[Tensor, "N"]:
    """
    KD per position, (N,).

    Args:
        logits_NV: of the student.
        top_NK, log_NK1: of the teacher, by `most_likely`.
        temperature: tau, that of the teacher's.
    """
    student_NK1 = _by_class(logits_NV, top_NK, temperature)
    p_NK1 = log_NK1.exp()
    difference = (log_NK1 - student_NK1).masked_fill(p_NK1 == 0, 0.0)  # not 0 times (-inf - -inf)
    return temperature**2 * (p_NK1 * difference).sum(-1)


def _by_class(
    logits_NV: Float[Tensor, "N V"], top_NK: Int[Tensor, "N K"], temperature: float
) -> Float[Tensor, "N K1"]:
    log_NV = F.log_softmax(logits_NV / temperature, dim=-1)
    rest_N1 = log_NV.scatter(-1, top_NK, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_NV.gather(-1, top_NK), rest_N1], dim=-1)
