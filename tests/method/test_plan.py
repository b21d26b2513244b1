"""The plan of a step, made for a whole batch at once, equals the one computed position by position, bit for bit."""

import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_reference import reference_plan, reference_segments
from steps import packed_example, padded_collator, padding_free_collator, random_examples
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from echo_trainer.method.indices import Indices
from echo_trainer.method.plan import make_plan
from echo_trainer.method.routing import RoutingSchedule
from echo_trainer.method.segments import find_segments
from echo_trainer.passes.echo import FORMS, ROWS, SUFFIX
from echo_trainer.run.answers import samples_of_documents


def left_padded(examples):
    batch = padded_collator()(examples)
    for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        padding = batch["attention_mask"].eq(0).sum(1).tolist()
        rows = zip(batch[name], padding, strict=True)
        batch[name] = torch.stack([torch.cat([row.new_full((n,), fill), row[: len(row) - n]]) for row, n in rows])
    return batch


def without_a_mask(examples):
    length = min(len(example["input_ids"]) for example in examples)
    return {name: torch.tensor([e[name][:length] for e in examples]) for name in ("input_ids", "labels")}


COLLATORS = {
    "padded": padded_collator(),
    "padded to a multiple": DataCollatorForLanguageModeling(pad_token_id=0, pad_to_multiple_of=8),
    "padding-free": padding_free_collator(),
    "padding-free to a multiple": DataCollatorForLanguageModeling(
        pad_token_id=0, padding_free=True, pad_to_multiple_of=8
    ),
    "with position ids": DataCollatorForLanguageModeling(pad_token_id=0, return_position_ids=True),
    "left-padded": left_padded,
    "without a mask": without_a_mask,
}

label_rows = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=6)


@settings(max_examples=600, deadline=None)
@given(
    rows=label_rows,
    unlabelled=st.booleans(),
    packed=st.integers(0, 3),
    collator=st.sampled_from(list(COLLATORS)),
    routes=st.integers(0, 2**12 - 1),
    positions=st.sampled_from(["answer", "predicting"]),
    form=st.sampled_from(list(FORMS.values())),
    lockstep=st.booleans(),
)
def test_plan_of_whole_batches_is_that_of_single_positions(
    rows, unlabelled, packed, collator, routes, positions, form, lockstep
):
    examples = [
        {"input_ids": [10 + t for t in range(len(row))], "labels": [10 + t if x else -100 for t, x in enumerate(row)]}
        for row in rows
    ]
    if packed and "padding-free" in collator:
        examples = [packed_example(examples[:packed]), *(packed_example([e]) for e in examples[packed:])]
    if unlabelled:
        examples = [{k: v for k, v in example.items() if k != "labels"} for example in examples]
        collator = "padding-free" if "free" in collator else "padded"
    batch = COLLATORS[collator](examples)
    segments, found = find_segments(batch, examples), reference_segments(batch, examples)
    assert torch.equal(segments.predict_N, found["predict_F"].nonzero().flatten())
    assert torch.equal(segments.labels_N, found["labels_F"][segments.predict_N])
    assert torch.equal(segments.document_N, found["document_F"][segments.predict_N])
    for name in (
        "document_F",
        "segment_F",
        "boundary_S",
        "document_S",
        "start_D",
        "end_D",
        "answered_D",
        "routable_D",
    ):
        assert torch.equal(getattr(segments, name), found[name]), name
    routed = [bool(routes >> i & 1) for i in range(segments.n_documents)]
    places = batch.get("position_ids")
    plan = make_plan(
        segments, routed, positions=positions, form=form, position_ids=places, probability=0.5, lockstep=lockstep
    )
    assert_equal_records(plan, reference_plan(found, segments, routed, positions, form, places, lockstep))


def assert_equal_records(left, right):
    assert type(left) is type(right)
    for item in fields(left):
        ours, theirs = getattr(left, item.name), getattr(right, item.name)
        if isinstance(ours, Indices):
            assert_equal_records(ours, theirs)
        elif isinstance(ours, tuple) and ours and isinstance(ours[0], Indices):
            assert len(ours) == len(theirs)
            for part, its in zip(ours, theirs, strict=True):
                assert_equal_records(part, its)
        elif isinstance(ours, torch.Tensor):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), item.name
        elif isinstance(ours, np.ndarray):
            assert np.array_equal(ours, theirs), item.name
        else:
            assert ours == theirs, item.name


@pytest.mark.parametrize("position", ["last", "first"])
def test_a_token_predicted_by_padding_is_of_no_document(position):
    """Left padding before an answer without a prompt; the document that is routed, first or last, is not its own."""
    routed = {"input_ids": [10, 11, 12, 13], "labels": [-100, -100, 12, 13]}
    alone = {"input_ids": [14, 15], "labels": [14, 15]}
    examples = [alone, routed] if position == "last" else [routed, alone]
    segments = find_segments(left_padded(examples), examples)
    assert segments.document_N.tolist().count(-1) == 1
    plan = make_plan(segments, [True, True], form=ROWS)
    assert (plan.n_routed, plan.n_routed_tokens, plan.n_unroutable) == (1, 2, 1)
    weights = dict(zip(plan.labels_N.tolist(), plan.plain_weight_N.tolist(), strict=True))
    assert weights == {12: 2, 13: 1, 14: 1, 15: 1}


def test_packed_rows_of_many_documents():
    """A batch of the size of real ones: 16 rows, hundreds of documents."""
    examples = [packed_example(random_examples(30, seed=row, turns=2, high=40)) for row in range(16)]
    batch = padding_free_collator()(examples)
    segments, found = find_segments(batch, examples), reference_segments(batch, examples)
    routed = (torch.arange(segments.n_documents) % 3 > 0).tolist()
    arguments = ("answer", SUFFIX, batch["position_ids"], False)
    plan = make_plan(segments, routed, form=arguments[1], position_ids=arguments[2], probability=0.5)
    assert segments.n_documents == 480
    assert_equal_records(plan, reference_plan(found, segments, routed, *arguments))


def calls_made(run):
    """How often Python calls a function, of Python or of C, while `run` runs."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("form", [SUFFIX, ROWS], ids=str)
def test_drawing_and_planning_take_as_many_calls_for_many_documents_as_for_few(form):
    """The process that trains does it between two steps; document by document, a thousand took 0.2 s."""
    schedule, calls = RoutingSchedule(seed=0, p_start=0.5, p_end=0.5, total_steps=2), {}
    for documents in (30, 600):
        rows = [packed_example(random_examples(documents // 2, seed=row, turns=2, high=40)) for row in range(2)]
        batch = padding_free_collator()(rows)
        segments = find_segments(batch, rows)
        options = {"form": form, "position_ids": batch["position_ids"], "n_parts": 3}
        sample_D, number_D = samples_of_documents(segments, rows, flat=True)

        def plan(segments=segments, sample_D=sample_D, number_D=number_D, options=options):
            return make_plan(segments, schedule.draw(0, 0, sample_D, number_D), **options)

        assert plan().n_parts == (3 if form is SUFFIX else 0) and len(number_D) == documents
        calls[documents] = calls_made(plan)
    assert calls[30] == calls[600]
