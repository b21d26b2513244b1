"""Rows of like length run together: the cheapest split, found by dynamic programming, and what it saves."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixes import MIXES, examples_of, tokens_of
from steps import packed_example, padded_collator, padding_free_collator, random_examples

from echo_trainer.method import grouping
from echo_trainer.method.grouping import MOST, MOST_CLASSES, group_cost, group_rows
from echo_trainer.method.plan import make_plan
from echo_trainer.method.segments import find_segments
from echo_trainer.passes.echo import SUFFIX


def cost_of(groups, run, prefix):
    """Cost of some groups of rows."""
    return sum(float(group_cost(torch.tensor(len(g)), run[g].max(), prefix[g].max())) for g in groups)


def cheapest(run, prefix, n_groups=None):
    """The least cost of any split of the rows in the order of their lengths, by trying all of them."""
    order = sorted(range(len(run)), key=lambda r: (int(run[r]), int(prefix[r])))
    costs = []
    for cuts in itertools.product((False, True), repeat=len(order) - 1):
        groups = [[order[0]]]
        for row, cut in zip(order[1:], cuts, strict=True):
            groups = [*groups, [row]] if cut else [*groups[:-1], [*groups[-1], row]]
        if n_groups is None or len(groups) == n_groups:
            costs.append(cost_of([torch.tensor(g) for g in groups], run, prefix))
    return min(costs)


# Each of these prefixes, and each number of tokens, is a class of its own.
lengths = st.lists(st.tuples(st.integers(1, 33), st.sampled_from([0, 5, 30, 100])), min_size=1, max_size=8)


@settings(max_examples=80, deadline=None)
@given(rows=lengths, price=st.sampled_from([0, 3, 40, 512]))
def test_the_split_is_the_cheapest(rows, price):
    """Against all splits."""
    run, prefix = torch.tensor([r for r, _ in rows]), torch.tensor([p for _, p in rows])
    before, grouping.PASS = grouping.PASS, price
    try:
        groups = group_rows(run, prefix)
        assert torch.equal(torch.cat(groups).sort().values, torch.arange(len(rows)))
        assert all(torch.equal(g, g.sort().values) for g in groups)
        if len(set(rows)) == len(rows) or price:  # like rows may as well be apart where a pass costs nothing
            assert cost_of(groups, run, prefix) == pytest.approx(cheapest(run, prefix))
    finally:
        grouping.PASS = before


@settings(max_examples=60, deadline=None)
@given(rows=lengths, n_groups=st.integers(1, 6))
def test_so_many_groups_as_asked_for(rows, n_groups):
    run, prefix = torch.tensor([r for r, _ in rows]), torch.tensor([p for _, p in rows])
    groups = group_rows(run, prefix, n_groups)
    assert len(groups) == min(n_groups, len(set(rows)))
    assert torch.equal(torch.cat(groups).sort().values, torch.arange(len(rows)))


def test_few_tokens_run_in_one_pass():
    """Another pass costs more than the padding of a small batch: rows stay in their order."""
    (rows,) = group_rows(torch.tensor([9, 3, 100, 7]), torch.tensor([5, 50, 2, 8]))
    assert rows.tolist() == [0, 1, 2, 3]


def test_one_long_prefix_is_apart_whatever_the_suffixes():
    """All suffixes alike: the row whose prefix is 7,500 tokens does not make the others' as long."""
    run, prefix = torch.full((823,), 60), torch.full((823,), 100)
    prefix[400] = 7500
    groups = group_rows(run, prefix)
    assert [400] in [g.tolist() for g in groups] and len(groups) == 2


def test_groups_and_classes_are_bounded():
    generator = torch.Generator().manual_seed(0)
    run, prefix = (torch.randint(1, 8192, (5000,), generator=generator) for _ in range(2))
    assert len(group_rows(run, prefix)) <= MOST
    assert int(grouping._classes(run, prefix).max()) < MOST_CLASSES


def packed_layout(name):
    prompt, answer = MIXES[name]()
    examples = examples_of(prompt, answer)
    batch = padding_free_collator()([packed_example(examples)])
    segments = find_segments(batch, examples)
    routed = [True] * segments.n_documents
    plan = make_plan(segments, routed, form=SUFFIX, position_ids=batch["position_ids"])
    return plan.layout, prompt, answer


@pytest.mark.parametrize("name", MIXES)
def test_at_most_15_per_cent_is_padding(name):
    """One pass for all ran up to 9.6 times the batch's tokens, with every prefix as long as the longest."""
    layout, prompt, answer = packed_layout(name)
    run, real, kept = tokens_of(layout)
    assert real == int((answer - 1).sum())
    assert kept == int(prompt.sum())
    assert 1 - real / run <= 0.15
    assert len(layout.parts) <= MOST
    # Keys and values of one layer and part, padded, are never more than the batch has tokens.
    assert max(part.mask_RK.numel() for part in layout.parts) <= int((prompt + answer).sum())


def test_equal_lengths_run_in_one_pass():
    segments = find_segments(padded_collator()(examples_of([256] * 64, [16] * 64)))
    layout = make_plan(segments, [True] * 64, form=SUFFIX).layout
    (part,) = layout.parts
    # 15 positions predict; the largest position id has a row of its own, which is less than a column.
    assert part.token_RA.shape == (65, 15) and len(part.real_token) == 64 * 15
    assert part.position_RA.max() == 271 and part.mask_RK[-1].sum() == 1


def test_idle_parts_fill_up():
    """Where other processes run more passes than the rows can be split into."""
    segments = find_segments(padded_collator()(random_examples(2)))
    plan = make_plan(segments, [True, True], form=SUFFIX, n_parts=5, lockstep=True)
    assert plan.n_parts == 5 and plan.layout.n_idle == 3 and not plan.weightless
    weightless = make_plan(segments, [False, False], form=SUFFIX, n_parts=5, lockstep=True)
    assert weightless.n_parts == weightless.layout.n_idle == 5 and weightless.weightless
