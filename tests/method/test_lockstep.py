"""An echo pass without weight runs like any other and changes nothing: what keeps sharded processes in step."""

import pytest
import torch
from models import adapted, tiny_model
from steps import (
    echo_setup,
    packed_example,
    padded_collator,
    padding_free_collator,
    planned_batch,
    random_examples,
    step_gradients,
)

from echo_trainer.method.routing import RoutingSchedule
from echo_trainer.method.silence import touch
from echo_trainer.passes import step
from echo_trainer.passes.echo import ROWS, SUFFIX
from echo_trainer.run.collate import EchoCollator

UNPREDICTED = [{"input_ids": [5, 6, 7], "labels": [5, -100, -100]}, {"input_ids": [8, 9], "labels": [-100, -100]}]
ONE_TOKEN = [{"input_ids": [5], "labels": [5]}]
BATCHES = {
    "padded": (padded_collator, random_examples(3)),
    "packed": (padding_free_collator, [packed_example(random_examples(3))]),
    "unpredicted": (padded_collator, UNPREDICTED),
    "one-token": (padded_collator, ONE_TOKEN),
}


def locked_batch(name: str, suffix: bool, p: float):
    """A batch in lockstep and its plan."""
    collator, examples = BATCHES[name]
    form = SUFFIX if suffix else ROWS
    echo = EchoCollator(collator(), lockstep=True, form=form)
    echo.schedule = RoutingSchedule(0, p, p, total_steps=10, batch_size=len(examples))
    batch = echo(examples, step=0)
    plan = batch.pop("echo_plan")
    batch.pop("labels")
    return batch, plan


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("suffix", [False, True], ids=["full", "suffix"])
@pytest.mark.parametrize("name", BATCHES)
def test_weightless_pass_changes_nothing(monkeypatch, name, suffix, checkpointing):
    """Objective and gradients of the plain pass, bit for bit; the echo pass did run, and with finite hidden states."""
    model = adapted(tiny_model()).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    setup = echo_setup(model, aggregation="weighted")
    collator, examples = BATCHES[name]
    batch, plain_plan = planned_batch(examples, suffix=suffix, p=0.0, collator=collator())
    expected, gradients = step_gradients(model, setup, batch, plain_plan)
    ran = []
    original = step.run_echo_pass

    def run(*args):
        hidden, injection = original(*args)
        ran.append(bool(torch.isfinite(hidden).all()) and hidden.requires_grad)
        return hidden, injection

    monkeypatch.setattr(step, "run_echo_pass", run)
    batch, plan = locked_batch(name, suffix, p=0.0)
    assert plain_plan.layout is None and plan.layout is not None and plan.weightless
    output, ours = step_gradients(model, setup, batch, plan)
    assert ran == [True]
    assert torch.equal(output["objective"], expected["objective"])
    assert ours.keys() == gradients.keys()
    for key, gradient in gradients.items():
        assert torch.equal(ours[key], gradient), key
    assert all(not ours[key].any() for key in ours if key.startswith("echo."))


@pytest.mark.parametrize("suffix", [False, True], ids=["full", "suffix"])
@pytest.mark.parametrize("lockstep", [False, True], ids=["ddp", "sharded"])
def test_broken_networks_do_not_reach_a_step_without_echo(lockstep, suffix):
    """NaN in the echo networks: a micro-batch that routes nothing has a finite objective and finite LoRA gradients."""
    model = adapted(tiny_model()).train()
    setup = echo_setup(model, aggregation="weighted")
    for parameter in setup.networks.parameters():
        parameter.data.fill_(float("nan"))
    batch, plan = locked_batch("padded", suffix, p=1.0)
    assert not plan.weightless
    if not lockstep:
        batch, plan = planned_batch(BATCHES["padded"][1], suffix=suffix)
    plan = plan.without_echo()
    assert plan.weightless == lockstep
    output, gradients = step_gradients(model, setup, batch, plan)
    assert torch.isfinite(output["objective"])
    # In lockstep the networks run, so that gradients arrive in the usual order, and theirs are 0 * NaN.
    finite = {name for name, gradient in gradients.items() if torch.isfinite(gradient).all()}
    assert finite >= {name for name in gradients if not (lockstep and name.startswith("echo."))}
    echo = {name for name, _ in setup.networks.named_parameters()}
    assert {f"echo.{name}" for name in echo} <= gradients.keys()


def test_touch():
    """Exactly zero, forward and backward, for values that are not finite; no gradient where none is wanted."""
    broken = torch.tensor([float("nan"), float("inf"), 1.0], requires_grad=True)
    frozen = torch.ones(2)
    zero = touch(broken, frozen)
    assert zero.item() == 0.0
    (3 * zero).backward()
    assert torch.equal(broken.grad, torch.zeros(3)) and frozen.grad is None
