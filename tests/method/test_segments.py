"""Segments, boundaries and the plan of a step, on batches small enough to check by hand, and on random ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import packed_example, padded_collator, padding_free_collator, random_examples

from echo_trainer.method.layouts import FullLayout, SuffixLayout
from echo_trainer.method.plan import make_plan
from echo_trainer.method.segments import find_segments, has_boundary
from echo_trainer.passes.echo import BATCH, FORMS, ROWS, SUFFIX

PROMPT = -100


def example(*labels):
    """An example whose token at t is 10 + t; its labels as given, the number 1 for an answer token."""
    ids = [10 + t for t in range(len(labels))]
    return {"input_ids": ids, "labels": [ids[t] if label == 1 else PROMPT for t, label in enumerate(labels)]}


def test_padded_batch():
    examples = [example(0, 0, 1, 1), example(0, 1), example(1, 1, 0, 0, 1)]
    segments = find_segments(padded_collator()(examples), examples)
    assert segments.shape == (3, 5)
    assert segments.boundary_S.tolist() == [1, 5, 13]
    assert segments.document_S.tolist() == [0, 1, 2]
    assert segments.segment_F.tolist() == [-1, -1, 0, 0, -1, -1, 1, -1, -1, -1, -1, -1, -1, -1, 2]
    assert segments.predict_N.tolist() == [1, 2, 5, 10, 13]
    assert segments.routable_D.tolist() == [True, True, True]


def test_padding_free_batch_knows_documents_without_a_prompt():
    """TRL masks the first label of each document; the examples still say whether it was an answer."""
    examples = [example(1, 1, 1), example(0, 1, 1), example(0, 0, 1)]
    batch = padding_free_collator()(examples)
    segments = find_segments(batch, examples)
    assert segments.start_D.tolist() == [0, 3, 6] and segments.end_D.tolist() == [3, 6, 9]
    assert segments.boundary_S.tolist() == [3, 7]
    assert segments.routable_D.tolist() == [False, True, True]
    assert segments.answered_D.tolist() == [True, True, True]


def test_packed_equals_padding_free():
    examples = random_examples(5, turns=2)
    packed = [packed_example(examples[:2]), packed_example(examples[2:])]
    left = find_segments(padding_free_collator()(examples), examples)
    right = find_segments(padding_free_collator()(packed), packed)
    for name in ("predict_N", "labels_N", "segment_F", "boundary_S", "document_S", "start_D"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (example(0, 1), True),
        (example(1, 1), False),
        (example(0, 0), False),
        (example(1, 0, 1), True),
        ({**example(0, 1, 1, 1), "seq_lengths": [1, 3]}, False),
        ({**example(1, 1, 0, 1), "seq_lengths": [2, 2]}, True),
    ],
)
def test_has_boundary(row, expected):
    assert has_boundary(row) is expected


def test_labels_are_required():
    with pytest.raises(ValueError, match="no 'labels'"):
        find_segments({"input_ids": torch.zeros(1, 2)})


def test_plan_of_a_suffix_pass():
    examples = [example(0, 0, 1, 1, 1), example(0, 1, 1), example(0, 0, 0, 1)]
    segments = find_segments(padded_collator()(examples), examples)
    plan = make_plan(segments, [True, False, True], form=SUFFIX)
    assert plan.predict_N.tolist() == [1, 2, 3, 5, 6, 12]
    # Row 0 is routed; its first answer token is predicted before the echo. Row 2 has a single answer token: the echo
    # comes too late for it, so it counts twice and is not run again.
    assert plan.plain_weight_N.tolist() == [2, 1, 1, 1, 1, 2]
    assert plan.reach_E.tolist() == [1, 2]
    assert isinstance(plan.layout, SuffixLayout)
    (part,) = plan.layout.parts
    # A place of padding at the end carries the largest position of the batch, which the plain pass has seen.
    assert part.token_RA.tolist() == [[2, 3, 3]]
    assert part.position_RA.tolist() == [[2, 3, 4]]
    assert (part.prefix_n.tolist(), part.place_n.tolist(), part.n_prefix) == ([0, 1], [0, 1], 2)
    assert part.mask_RK.tolist() == [[1, 1, 1, 1, 0]]
    assert (plan.n_samples, plan.n_routed, plan.n_unroutable, plan.n_routed_tokens) == (3, 2, 0, 4)


def test_predicting_positions_reach_the_first_answer_token():
    examples = [example(0, 0, 1, 1), example(0, 0, 0, 1)]
    segments = find_segments(padded_collator()(examples), examples)
    plan = make_plan(segments, [True, True], form=SUFFIX, positions="predicting")
    assert plan.plain_weight_N.tolist() == [1, 1, 1]
    (part,) = plan.layout.parts
    assert part.token_RA[:, 0].tolist() == [1, 6]
    assert part.prefix_n.tolist() == [0, 4, 5]
    assert part.place_n.tolist() == [1, 4, 5]  # right-aligned: padding comes first
    assert part.mask_RK.tolist() == [[0, 1, 1, 1], [1, 1, 1, 0]]


label_rows = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=5)


@settings(max_examples=300, deadline=None)
@given(
    rows=label_rows,
    routes=st.integers(0, 31),
    free=st.booleans(),
    predicting=st.booleans(),
    form=st.sampled_from(list(FORMS.values())),
    n_parts=st.sampled_from([None, 1, 2, 4]),
)
def test_plans_of_random_batches(rows, routes, free, predicting, form, n_parts):
    """Whatever the labels: every plan is consistent, and no position receives an echo from a later boundary."""
    examples = [example(*row) for row in rows]
    batch = (padding_free_collator() if free else padded_collator())(examples)
    segments = find_segments(batch, examples)
    routed = [bool(routes >> i & 1) for i in range(segments.n_documents)]
    plan = make_plan(
        segments,
        routed,
        positions="predicting" if predicting else "answer",
        form=form,
        position_ids=batch.get("position_ids"),
        n_parts=n_parts,
    )
    assert plan.labels_N.ge(0).all() and len(plan.labels_N) == int(batch["labels"][:, 1:].ne(-100).sum())
    assert plan.n_routed + plan.n_unroutable <= plan.n_samples <= len(rows)
    weight = plan.plain_weight_N.clone()
    weight[plan.reach_E] += 1
    assert int((weight - 1).sum()) == plan.n_routed_tokens
    layout = plan.layout
    if layout is None:
        assert len(plan.reach_E) == 0
        return
    length = segments.shape[1]
    if isinstance(layout, FullLayout):
        row_R = torch.arange(segments.shape[0]) if layout.row_R is None else layout.row_R
        assert len(row_R) == segments.shape[0] or form is ROWS
        runs = [(layout, (row_R[:, None] * length + torch.arange(length)).flatten())]
    else:
        assert n_parts is None or len(layout.parts) == n_parts
        runs = [(part, part.token_RA.flatten()) for part in layout.parts]
    outputs, injected = [], 0
    for run, token in runs[: len(runs) - getattr(layout, "n_idle", 0)]:
        outputs.append(token[run.output_position_E])
        position = token[run.inject_position_J]
        boundary = plan.boundary_G[run.inject_segment_J]
        assert position.ge(boundary if predicting else boundary + 1).all()
        assert segments.document_F[position].eq(segments.document_F[boundary]).all()
        injected += len(position)
        if isinstance(layout, SuffixLayout):
            assert_right_suffixes(run, segments, places_of_tokens(batch))
    outputs = torch.cat(outputs)
    order_E = getattr(layout, "order_E", None)
    outputs = outputs if order_E is None else outputs[order_E]
    assert torch.equal(outputs, plan.predict_N[plan.reach_E])
    again = make_plan(segments, routed, positions="predicting" if predicting else "answer", form=BATCH)
    if isinstance(layout, SuffixLayout):  # what comes after the last position that predicts is not run
        assert injected <= len(again.layout.inject_position_J)


def places_of_tokens(batch):
    """Position id of every token of a batch, (F,)."""
    shape = batch["input_ids"].shape
    return batch.get("position_ids", torch.arange(shape[1])).expand(shape).flatten()


def assert_right_suffixes(part, segments, places):
    """Each row is one document: all of it before its suffix is its prefix, and ends where the suffix begins."""
    width, n_prefix = part.token_RA.shape[1], part.n_prefix
    keys = torch.full(part.mask_RK.shape, -1).flatten()
    keys[part.place_n] = part.prefix_n
    keys = keys.view(part.mask_RK.shape)
    real = torch.zeros(part.token_RA.numel(), dtype=torch.bool)
    real[part.real_token] = True
    keys[:, n_prefix:] = part.token_RA.masked_fill(~real.view(part.token_RA.shape), -1)
    for row, mask in zip(keys.tolist(), part.mask_RK.tolist(), strict=True):
        tokens = [token for token in row if token >= 0]
        if not tokens:  # a row for the largest position
            assert mask == [0] * n_prefix + [1] + [0] * (width - 1)
            continue
        document = int(segments.document_F[tokens[0]])
        start, end = int(segments.start_D[document]), int(segments.end_D[document])
        assert tokens == list(range(start, start + len(tokens))) and tokens[-1] < end
        assert [int(key >= 0) for key in row] == mask
        first = next(place for place, key in enumerate(row) if key >= 0)
        assert row[first : first + len(tokens)] == tokens  # no gap between prefix and suffix
    assert torch.equal(part.position_RA.flatten()[real], places[part.token_RA.flatten()[real]])
    assert int(part.position_RA.max()) == int(places.max()) and not real.all()
