"""KD on a teacher's most likely tokens: a reference with loops, and the whole vocabulary as a limit."""

import math

import pytest
import torch

from echo_trainer.method.losses import distillation
from echo_trainer.method.soft_labels import most_likely, soft_distillation


def logits(n, vocabulary, seed):
    return 3 * torch.randn(n, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(teacher, student, count, tau):
    """Position by position and token by token."""
    found = []
    for t, s in zip(teacher.tolist(), student.tolist(), strict=True):
        both = []
        for row in (t, s):
            weights = [math.exp(value / tau) for value in row]
            both.append([weight / sum(weights) for weight in weights])
        top = sorted(range(len(t)), key=lambda token: -t[token])[:count]
        classes = [*([token] for token in top), [token for token in range(len(t)) if token not in top]]
        sums = [[sum(p[token] for token in tokens) for tokens in classes] for p in both]
        found.append(tau**2 * sum(p * (math.log(p) - math.log(q)) for p, q in zip(*sums, strict=True)))
    return found


@pytest.mark.parametrize("tau", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("count", [1, 3, 10])
def test_reference(count, tau):
    teacher, student = logits(5, 11, 0), logits(5, 11, 1)
    top, logs = most_likely(teacher, count, tau)
    assert top.shape == (5, count) and logs.shape == (5, count + 1)
    assert torch.allclose(logs.exp().sum(-1), torch.ones(5, dtype=torch.float64))
    found = soft_distillation(student, top, logs, tau)
    assert found.tolist() == pytest.approx(reference(teacher, student, count, tau), rel=1e-12)


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_all_tokens_are_the_whole_divergence_and_fewer_are_less(tau):
    teacher, student = logits(4, 9, 2), logits(4, 9, 3).requires_grad_()
    whole = distillation(student, teacher, tau, "echo")
    (expected,) = torch.autograd.grad(whole.sum(), student)
    found = soft_distillation(student, *most_likely(teacher, 8, tau), tau)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert torch.allclose(found, whole, rtol=1e-12) and torch.allclose(gradient, expected, atol=1e-12)
    before = whole
    for count in (7, 4, 2, 1):
        less = soft_distillation(student, *most_likely(teacher, count, tau), tau)
        assert (less <= before + 1e-12).all() and (less >= -1e-12).all()
        before = less


def test_a_teacher_that_rules_tokens_out():
    teacher, student = logits(2, 6, 4), logits(2, 6, 5).requires_grad_()
    teacher[:, 3:] = -torch.inf
    found = soft_distillation(student, *most_likely(teacher, 3, 1.0), 1.0)
    found.sum().backward()
    assert torch.isfinite(found).all() and torch.isfinite(student.grad).all()
