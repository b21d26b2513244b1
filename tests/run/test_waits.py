"""A step never waits for the device: nothing of ours reads a value of it between collation and the end of backward."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from models import adapted, tiny_model
from steps import (
    PAPER,
    echo_setup,
    packed_example,
    padded_collator,
    padding_free_collator,
    planned_batch,
    random_examples,
)
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from training import DATA_FORMS, echo_trainer
from without_data import forget_values, without_data

import echo_trainer as package
from echo_trainer.compat.dispatch import TorchDispatchMode
from echo_trainer.method import losses
from echo_trainer.method.indices import together
from echo_trainer.passes.echo import FORMS, SUFFIX
from echo_trainer.passes.step import echo_step
from echo_trainer.run.agreement import Agreement
from echo_trainer.run.metrics import EchoMetrics

OURS = str(Path(package.__file__).parent)
READS = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "repeat_interleave", "equal", "is_nonzero")
BATCHES = {
    "padded": (padded_collator(), random_examples(4, seed=2, turns=2)),
    "packed": (padding_free_collator(), [packed_example(random_examples(4, seed=2, turns=2))]),
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("suffix", [False, True], ids=["full", "suffix"])
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_step_on_tensors_without_values(monkeypatch, family, name, suffix, checkpointing):
    """Forward and backward, the loss in several chunks; whoever asks for a value, transformers too, gets an error."""
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 60 * 7)
    model = adapted(tiny_model(family)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    setup = echo_setup(model, aggregation="weighted")
    collator, examples = BATCHES[name]
    batch, plan = planned_batch(examples, suffix=suffix, collator=collator)
    assert len(plan.labels_N) > 3 * 7 and len(plan.reach_E) > 7
    with FakeTensorMode() as mode:
        forget_values(mode, model)
        forget_values(mode, setup.networks)
        output = echo_step(setup, PAPER, without_data(mode, batch), without_data(mode, plan))
        output["objective"].backward()
        with pytest.raises(DataDependentOutputException):
            bool(output["objective"] > 0)
    parameters = [*model.parameters(), *setup.networks.parameters()]
    assert all(p.grad is not None and p.grad.shape == p.shape for p in parameters if p.requires_grad)


class Reads(TorchDispatchMode):
    """Counts the operations that tell the host a value, by whether a file of ours asks for it."""

    def __init__(self):
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if any(name.startswith(read) for read in READS) and self._asked_by_us():
            self.found[name] += 1
        return func(*args, **(kwargs or {}))

    def _asked_by_us(self) -> bool:
        frame = sys._getframe(2)
        while "/torch/" in frame.f_code.co_filename:
            frame = frame.f_back
        return frame.f_code.co_filename.startswith(OURS)


@pytest.mark.parametrize("form", DATA_FORMS)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_an_optimizer_step_is_looked_at_once(tmp_path, form, accumulation):
    """The guard reads one value after the last backward pass; nobody else of us reads any."""
    settings, rows = DATA_FORMS[form]
    settings = {**settings, "max_steps": 3, "gradient_accumulation_steps": accumulation}
    settings |= {"per_device_train_batch_size": 2, "echo_pass": "suffix"}
    trainer = echo_trainer(tmp_path, rows=rows(), **settings)
    step, found = trainer.training_step, []

    def counted(*args):
        with Reads() as reads:
            loss = step(*args)
        found.append(dict(reads.found))
        return loss

    trainer.training_step = counted
    trainer.train()
    one = [{}] * (accumulation - 1) + [{"_local_scalar_dense": 1}]
    assert found == one * 3


class Copies(TorchDispatchMode):
    """Counts what is sent to another device."""

    def __init__(self):
        super().__init__()
        self.sent = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and args and isinstance(args[0], torch.Tensor):
            self.sent += [result.numel()] if args[0].device != result.device else []
        return result


@pytest.mark.parametrize("form", FORMS.values(), ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_a_plan_travels_in_one_copy(name, form):
    collator, examples = BATCHES[name]
    _, plan = planned_batch(examples, suffix=form is SUFFIX, collator=collator)
    with Copies() as copies:
        away = plan.to("meta")
    assert len(copies.sent) == 1
    for record, other in ((plan, away), (plan.layout, away.layout)):
        for field, value in vars(record).items():
            if isinstance(value, torch.Tensor):
                moved = getattr(other, field)
                assert moved.is_meta and moved.shape == value.shape and moved.dtype == value.dtype, field
    assert away.reach_host_E is plan.reach_host_E and plan.to("cpu") is plan


def test_what_travels_together_arrives_as_it_was():
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randint(-9, 9, (3, 5), generator=generator),
        torch.zeros(0, dtype=torch.int64),
        torch.rand(7, generator=generator),
        torch.rand(4, 4, generator=generator).gt(0.5)[:, 1],
        torch.randint(0, 9, (6, 2), generator=generator, dtype=torch.int32).T,
        torch.tensor(4.5, dtype=torch.float64),
    ]
    for sent, tensor in zip(together(tensors, torch.device("cpu")), tensors, strict=True):
        assert sent.dtype == tensor.dtype and sent.shape == tensor.shape and torch.equal(sent, tensor)


def test_tokens_are_counted_in_whole_numbers():
    """78,641,405 was logged as 78,641,408: float32 counts in steps of eight there."""
    from dataclasses import replace

    _, plan = planned_batch(BATCHES["padded"][1], suffix=True)
    assert plan.n_tokens == sum(len(example["input_ids"]) for example in BATCHES["padded"][1])
    metrics, output = EchoMetrics(Agreement()), {"objective": torch.zeros(())}
    for n_tokens in (78_641_400, 3, 2):
        metrics.add(output, replace(plan, n_tokens=n_tokens, probability=0.1))
    found = metrics.drain()
    assert found["input_tokens"] == 78_641_405 and type(found["input_tokens"]) is int
    assert found["echo/p"] == pytest.approx(0.1, rel=1e-15)
    assert metrics.drain() == {}
