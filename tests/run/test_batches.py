"""Batches of the training loader: TRL's own dicts, collated in the workers, which know where their answers are."""

import copy
import os
import pickle

import pytest
import torch
from models import prompt_completion_rows
from steps import padded_collator, padding_free_collator, random_examples
from torch.utils.data import DataLoader
from training import DATA_FORMS, assert_equal, echo_trainer, losses, plain_trainer, trainable
from transformers import BatchFeature
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from echo_trainer.run.answers import EchoBatch, answers_of
from echo_trainer.run.collate import EchoCollator


def assert_same_batch(left, right):
    assert list(left) == list(right)
    for name, value in right.items():
        same = torch.equal(left[name], value) if torch.is_tensor(value) else left[name] == value
        assert same, name


def assert_same_answers(left, right):
    for name in ("predict_N", "labels_N", "document_N", "start_S", "end_S", "document_S", "start_D", "end_D"):
        assert torch.equal(getattr(left.segments, name), getattr(right.segments, name)), name
    assert left.sample_D.tolist() == right.sample_D.tolist() and left.number_D.tolist() == right.number_D.tolist()
    assert left.n_samples == right.n_samples


class Noted:
    """A collator that notes in which process it runs."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, examples):
        return {**self.collator(examples), "process": os.getpid()}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("form", DATA_FORMS)
def test_a_loader_gives_the_batches_of_trl(tmp_path, form, workers):
    """The same dicts with the same keys and tensors: to look at, to count in, to give to a model."""
    settings, rows = DATA_FORMS[form]
    settings = {**settings, "dataloader_num_workers": workers}
    ours = list(echo_trainer(tmp_path / "a", rows=rows(), **settings).get_train_dataloader())
    theirs = list(plain_trainer(tmp_path / "b", rows=rows(), **settings).get_train_dataloader())
    assert len(ours) == len(theirs) > 2
    for batch, other in zip(ours, theirs, strict=True):
        assert isinstance(batch, dict) and batch["input_ids"].dim() == 2
        assert_same_batch(batch, other)
        assert int(batch["labels"][..., 1:].ne(-100).sum()) == len(batch.answers.segments.predict_N)


def test_workers_collate(tmp_path):
    """Also vision processors and other collators of one's own: the process that trains does not wait for them."""
    settings = {"trainer_kwargs": {"data_collator": Noted(padded_collator())}}
    here = echo_trainer(tmp_path / "a", **settings)
    assert {batch["process"] for batch in here.get_train_dataloader()} == {os.getpid()}
    elsewhere = echo_trainer(tmp_path / "b", dataloader_num_workers=2, **settings)
    processes = {batch["process"] for batch in elsewhere.get_train_dataloader()}
    assert len(processes) == 2 and os.getpid() not in processes


def test_the_collator_of_a_trainer_stays_what_it_was(tmp_path):
    """Evaluation collates with it, and a script may read or replace it."""
    own = padded_collator()
    trainer = echo_trainer(tmp_path / "a", trainer_kwargs={"data_collator": own}, max_steps=1)
    assert trainer.data_collator is own
    assert type(echo_trainer(tmp_path / "b").data_collator) is DataCollatorForLanguageModeling
    replaced = DataCollatorForLanguageModeling(pad_token_id=0, pad_to_multiple_of=32)
    trainer.data_collator = replaced
    assert all(batch["input_ids"].shape[1] % 32 == 0 for batch in trainer.get_train_dataloader())
    trainer.train()
    assert trainer.data_collator is replaced and trainer.state.log_history[0]["echo/routed"] == 1


def test_a_loader_of_ones_own(tmp_path):
    """Its batches do not say where their answers are; they are looked for, and the run is the same."""
    settings = {"max_steps": 3, "echo_p_start": 0.5, "echo_p_end": 0.5, "train_sampling_strategy": "sequential"}
    usual = echo_trainer(tmp_path / "a", **settings)
    usual.train()
    replaced = echo_trainer(tmp_path / "b", **settings)
    loader = DataLoader(replaced.train_dataset, batch_size=4, collate_fn=padded_collator())
    replaced.get_train_dataloader = lambda: replaced.accelerator.prepare(loader)
    replaced.train()
    assert losses(usual) == losses(replaced)
    assert_equal(trainable(usual), trainable(replaced))


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_dispatched_batches_in_one_process(tmp_path, form):
    """There is nothing to send; the run is the one without the option."""
    settings, rows = DATA_FORMS[form]
    settings = {**settings, "max_steps": 3, "echo_p_start": 0.5, "echo_p_end": 0.5}
    plain = echo_trainer(tmp_path / "a", rows=rows(), **settings)
    plain.train()
    dispatched = echo_trainer(tmp_path / "b", rows=rows(), accelerator_config={"dispatch_batches": True}, **settings)
    dispatched.train()
    assert losses(plain) == losses(dispatched)
    assert_equal(trainable(plain), trainable(dispatched))


def test_padding_free_batches_cannot_be_dispatched(tmp_path, monkeypatch):
    """TRL gives accelerate numbers there, which it cannot concatenate: a TypeError at the first batch."""
    from accelerate import Accelerator

    settings, rows = DATA_FORMS["packed"]
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 2))
    with pytest.raises(ValueError, match=r"`dispatch_batches=True` .*padding-free.*'dispatch_batches': False"):
        echo_trainer(tmp_path, rows=rows(), accelerator_config={"dispatch_batches": True}, **settings)


COLLATED = {
    "padded": (padded_collator(), random_examples(4, seed=3, turns=2)),
    "padding-free": (padding_free_collator(), random_examples(4, seed=3, turns=2)),
}


@pytest.mark.parametrize("name", COLLATED)
def test_answers_stay_with_a_batch(name):
    """Through a pipe between processes, pinning (which copies and updates), a device, and a copy."""
    collator, examples = COLLATED[name]
    batch = EchoCollator(collator)(examples)
    pinned = copy.copy(batch)
    pinned.update({key: value.clone() if torch.is_tensor(value) else value for key, value in batch.items()})
    for other in (pickle.loads(pickle.dumps(batch)), pinned, batch.to("cpu"), copy.deepcopy(batch)):
        assert type(other) is EchoBatch
        assert_same_batch(other, batch)
        assert_same_answers(other.answers, batch.answers)
    away = batch.to("meta", non_blocking=True)
    assert {value.device.type for value in away.values() if torch.is_tensor(value)} == {"meta"}
    assert away.answers is batch.answers and not batch["input_ids"].is_meta


@pytest.mark.parametrize("name", COLLATED)
def test_answers_that_got_lost_are_found_again(name):
    """What another loader gives, or accelerate has cut out of a larger batch."""
    collator, examples = COLLATED[name]
    batch = EchoCollator(collator)(examples)
    lost = answers_of(dict(batch))
    for key in ("predict_N", "labels_N", "document_N", "start_S", "end_S", "start_D", "end_D"):
        assert torch.equal(getattr(lost.segments, key), getattr(batch.answers.segments, key)), key
    places = list(zip(lost.sample_D.tolist(), lost.number_D.tolist(), strict=True))
    # In one long row nothing says which example a document was.
    assert places == ([(0, i) for i in range(4)] if name == "padding-free" else [(i, 0) for i in range(4)])


def test_other_inputs_are_kept():
    """Images, numbers and nested records of a processor, in whatever mapping it returns them."""
    images = torch.rand(3, 3, 8, 8)

    def processor(examples):
        return BatchFeature({**padded_collator()(examples), "pixel_values": images, "sizes": [[8, 8]] * 3})

    batch = EchoCollator(processor)(random_examples(3))
    assert batch["pixel_values"] is images and batch["sizes"] == [[8, 8]] * 3
    assert batch.to("meta")["pixel_values"].is_meta


@pytest.mark.parametrize("workers", [1, 2])
def test_streams(tmp_path, workers):
    """A stream keeps its columns and its order; nothing is cut up, and routes do not depend on the workers."""
    from datasets import Dataset

    def run(folder, workers, shards):
        rows = Dataset.from_list(prompt_completion_rows(40)).to_iterable_dataset(num_shards=shards)
        settings = {"max_steps": 3, "echo_p_start": 0.5, "echo_p_end": 0.5, "gradient_accumulation_steps": 2}
        trainer = echo_trainer(tmp_path / folder, rows=rows, dataloader_num_workers=workers, **settings)
        trainer.train()
        return trainer

    one, other = run("a", 0, 1), run("b", workers, 1)
    assert losses(one) == losses(other)
    assert_equal(trainable(one), trainable(other))
