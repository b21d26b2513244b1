"""KD and the statistics where a model rules tokens out with logits of -inf."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from echo_trainer.method.losses import EchoLoss, chunked_objective, distillation

INF = math.inf
TEACHERS = ["echo", "plain", "mutual"]


def loops(plain, echo, tau, teacher):
    """KD of each position, as sums over the tokens that the teacher allows."""

    def probabilities(row):
        weights = [math.exp(value / tau) for value in row]  # exp(-inf) is 0
        return [weight / sum(weights) for weight in weights]

    def divergence(teacher_row, student_row):
        pairs = zip(probabilities(teacher_row), probabilities(student_row), strict=True)
        return tau**2 * sum(p * math.log(p / q) for p, q in pairs if p > 0)

    terms = {"echo": [(echo, plain)], "plain": [(plain, echo)], "mutual": [(echo, plain), (plain, echo)]}[teacher]
    return [sum(divergence(t[i], s[i]) for t, s in terms) for i in range(len(plain))]


def logits(seed, banned=(), n=3, vocabulary=7):
    values = torch.randn(n, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values[:, list(banned)] = -INF
    return values.requires_grad_()


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("banned", [(), (2,), (0, 5, 6)], ids=str)
@pytest.mark.parametrize("tau", [1.0, 2.5])
def test_tokens_that_both_passes_rule_out(tau, banned, teacher):
    """The value of the loops, and the gradients of the same logits without those tokens."""
    plain, echo = logits(1, banned), logits(2, banned)
    kd = distillation(plain, echo, tau, teacher)
    expected = loops(plain.tolist(), echo.tolist(), tau, teacher)
    torch.testing.assert_close(kd, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    kd.sum().backward()
    allowed = [i for i in range(7) if i not in banned]
    fewer = [values.detach()[:, allowed].requires_grad_() for values in (plain, echo)]
    distillation(*fewer, tau, teacher).sum().backward()
    for values, without in zip((plain, echo), fewer, strict=True):
        if without.grad is None:
            assert values.grad is None
            continue
        torch.testing.assert_close(values.grad[:, allowed], without.grad, rtol=1e-12, atol=1e-15)
        assert not values.grad[:, list(banned)].any()


def test_a_token_that_the_teacher_alone_rules_out_adds_nothing():
    plain, echo = logits(1), logits(2, banned=(3,))
    expected = loops(plain.tolist(), echo.tolist(), 2.0, "echo")
    torch.testing.assert_close(
        distillation(plain, echo, 2.0, "echo"), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("size", [1.0, 400.0])  # 400: probabilities that are 0 in float32
def test_a_token_that_the_student_alone_rules_out_is_infinitely_far(size):
    plain, echo = logits(1, banned=(3,)), logits(2)
    with torch.no_grad():
        echo[0, 0] = size
    kd = distillation(plain, echo, 1.0, "echo")
    assert torch.isinf(kd[1:]).all() and not torch.isnan(kd).any()


@pytest.mark.parametrize("size", [1.0, 60.0])
def test_finite_logits_give_the_bits_of_kl_div(size):
    generator = torch.Generator().manual_seed(3)
    plain, echo = (size * torch.randn(5, 300, generator=generator) for _ in range(2))
    plain.requires_grad_()
    kd = distillation(plain, echo, 2.0, "echo")
    (gradient,) = torch.autograd.grad(kd.sum(), plain)
    logs = F.log_softmax(plain / 2.0, dim=-1), F.log_softmax(echo / 2.0, dim=-1)
    theirs = 4.0 * F.kl_div(*logs, reduction="none", log_target=True).sum(-1)
    assert torch.equal(kd, theirs) and torch.equal(gradient, torch.autograd.grad(theirs.sum(), plain)[0])


class RulesOut(nn.Module):
    """A head whose last two logits are -inf, such as a vocabulary that was padded."""

    parameters, vocabulary = (), 9

    def __init__(self):
        super().__init__()
        self.weight = torch.randn(7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def logits(self, hidden):
        return F.pad(hidden @ self.weight.T, (0, 2), value=-INF)


def test_objective_and_statistics_stay_finite():
    generator = torch.Generator().manual_seed(1)
    plain, echo = (torch.randn(5, 4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    labels, reach, head = torch.tensor([0, 3, 6, 1, 2]), torch.tensor([1, 2, 4]), RulesOut()
    weight = torch.ones(5, dtype=torch.float64)
    terms = EchoLoss(1.0, 2.0, "echo")
    objective, found = chunked_objective(plain, echo[:3], labels, weight, reach, reach.numpy(), head, terms)
    gradients = torch.autograd.grad(objective, (plain, echo))
    assert all(torch.isfinite(x).all() for x in (objective, *found, *gradients))
    logs = F.log_softmax(plain @ head.weight.T, dim=-1)
    torch.testing.assert_close(found.entropy, -(logs.exp() * logs).sum().detach())
