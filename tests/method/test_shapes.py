"""Shapes in annotations are checked at every call of a test, and a wrong one is caught."""

import pkgutil
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from jaxtyping import TypeCheckError
from shapes import CHECKED

from echo_trainer.method.layouts import PassLayout
from echo_trainer.method.losses import cross_entropy, distillation
from echo_trainer.method.network import EchoNetwork, NetworkForm
from echo_trainer.method.plan import make_plan
from echo_trainer.method.rows import take_rows
from echo_trainer.method.segments import find_segments
from echo_trainer.passes.full import ROWS
from echo_trainer.passes.rounding import relative


def indices(n):
    return torch.zeros(n, dtype=torch.int64)


def plan():
    labels = torch.tensor([[-100, -100, 3, 4], [-100, 5, 6, 7]])
    return make_plan(find_segments({"labels": labels}), [True, True], form=ROWS)


WRONG = {
    "lengths differ": lambda: cross_entropy(torch.zeros(3, 5), indices(4)),
    "no whole numbers": lambda: cross_entropy(torch.zeros(3, 5), torch.zeros(3)),
    "vocabularies differ": lambda: distillation(torch.zeros(3, 5), torch.zeros(3, 6), 2.0, "echo"),
    "a dimension too many": lambda: EchoNetwork(4, 3, NetworkForm(), torch.Generator())(torch.zeros(1, 2, 4)),
    "not a batch": lambda: take_rows(torch.zeros(3), indices(1)),
    "sizes differ": lambda: relative(torch.zeros(2, 3), torch.zeros(2, 4)),
    "a position without a segment": lambda: PassLayout(indices(3), indices(2), indices(4)),
    "labels that are missing": lambda: replace(plan(), labels_N=plan().labels_N[1:]),
    "weights in whole numbers": lambda: replace(plan(), plain_weight_N=plan().labels_N),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_wrong_shape_is_caught(call):
    with pytest.raises(TypeCheckError):
        call()


@pytest.mark.parametrize("package", CHECKED)
def test_every_module_is_checked(package):
    """One that was imported before the hook was in place would be checked by nobody."""
    names = [info.name for info in pkgutil.iter_modules(import_module(package).__path__)]
    assert names
    for name in names:
        assert hasattr(import_module(f"{package}.{name}"), "jaxtyping"), name
