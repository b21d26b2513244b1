"""So many of each in every batch, each row once before any twice, and the same order every time."""

from collections import Counter

import pytest
from datasets import Dataset

from echo_trainer.labelling.label import Label
from echo_trainer.labelling.mixture import batches_for, mixture, taught_rows
from echo_trainer.labelling.options import DistillOptions


def rows(n, first):
    """Rows that say which they are."""
    return [{"input_ids": [first + i, 1], "labels": [-100, 1]} for i in range(n)]


def labelled(n):
    return Dataset.from_list(rows(n, 0))


def taught(n, soft=False):
    top = {"top": [[1, 2]], "logs": [[-1.0, -2.0, -3.0]]} if soft else {}
    labels = [Label(i, {}, 1.0, -1.0, 1, 1, None, **top) for i in range(n)]
    return taught_rows(labels, rows(n, 1000), soft)


@pytest.mark.parametrize(("ratio", "batch", "n_labelled"), [
    ("4:8", 12, 4), ("1:1", 6, 3), ("3:1", 8, 6), ("0:2", 5, 0),
])  # fmt: skip
def test_the_ratio_is_exact_in_every_batch(ratio, batch, n_labelled):
    parts = DistillOptions(ratio=ratio).parts
    data = mixture(labelled(7) if n_labelled else None, taught(11), parts, batch, 9, seed=3)
    assert len(data) == 9 * batch
    seen = [ids[0] for ids in data["input_ids"]]
    for start in range(0, len(seen), batch):
        assert sum(row < 1000 for row in seen[start : start + batch]) == n_labelled
    for kind, n in ((lambda row: row < 1000, 7), (lambda row: row >= 1000, 11)):
        drawn = [row for row in seen if kind(row)]
        for start in range(0, len(drawn), n):
            assert max(Counter(drawn[start : start + n]).values(), default=1) == 1
    again = mixture(labelled(7) if n_labelled else None, taught(11), parts, batch, 9, seed=3)
    other = mixture(labelled(7) if n_labelled else None, taught(11), parts, batch, 9, seed=4)
    assert again["input_ids"] == data["input_ids"] != other["input_ids"]


def test_a_longer_run_begins_like_a_shorter_one():
    one, two = (mixture(labelled(7), taught(11), (1, 2), 6, n, seed=0)["input_ids"] for n in (4, 9))
    assert list(two)[: len(one)] == list(one)


def test_distributions_go_with_their_rows():
    data = mixture(labelled(4), taught(4, soft=True), (1, 1), 2, 4, seed=0)
    for row in data:
        assert (row["teacher_tokens"] == [[1, 2]]) == (row["input_ids"][0] >= 1000)
        assert row["teacher_tokens"] or row["teacher_logs"] is None


def test_passes_through_the_taught_rows():
    assert batches_for(1, 800, 12, (1, 2)) == 100
    assert batches_for(0.5, 801, 12, (1, 2)) == 51
    assert batches_for(3, 10, 4, (0, 1)) == 8


@pytest.mark.parametrize(("given", "message"), [
    ({"parts": (1, 2), "batch_size": 8}, "Write a multiple of 3"),
    ({"parts": (1, 2), "labelled": None}, "asks for labelled rows, and there are none"),
    ({"parts": (1, 2), "labelled": labelled(0)}, "asks for labelled rows, and there are none"),
])  # fmt: skip
def test_what_does_not_fit(given, message):
    options = {"labelled": labelled(3), "taught": taught(3), "batch_size": 6, "n_batches": 2, "seed": 0, **given}
    with pytest.raises(ValueError, match=message):
        mixture(**options)


def test_distributions_of_another_tokenizer_are_refused():
    labels = [Label(0, {}, 1.0, -1.0, 1, 1, None, top=[[1], [2]], logs=[[0.0, 0.0], [0.0, 0.0]])]
    with pytest.raises(ValueError, match="holds 2 distributions, and its answer has 1 tokens"):
        taught_rows(labels, rows(1, 0), True)


@pytest.mark.parametrize(("option", "message"), [
    ({"teacher": "me"}, "'echo', 'plain', 'base'"),
    ({"labels": "medium"}, "'hard', 'soft'"),
    ({"start": "end"}, "'run', 'fresh'"),
    ({"ratio": "1"}, "as A:B with B above 0"),
    ({"ratio": "2:0"}, "as A:B with B above 0"),
    ({"ratio": 0.5}, "as A:B with B above 0"),
    ({"n_samples": 0}, "whole number of at least 1"),
    ({"max_new_tokens": 1.5}, "whole number of at least 1"),
    ({"temperature": 0}, "divides logits"),
    ({"soft_temperature": float("inf")}, "divides logits"),
    ({"min_confidence": 1.2}, "from 0"),
    ({"min_confidence": float("nan")}, "from 0"),
])  # fmt: skip
def test_options_outside_their_range(option, message):
    with pytest.raises(ValueError, match=message):
        DistillOptions(**option)
