"""What belongs to which row, whatever the shapes happen to be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_trainer.run.ownership import Ownership

LENGTH = 9


def collator(examples):
    """
    A batch with inputs of every meaning; a row is a list of images, each a list of its patches.

    `per_image` and `per_row` have entries of the same shape, so that only their meaning tells them apart.
    """
    rows = [example["images"] for example in examples]
    images = [image for row in rows for image in row]
    most = max(map(len, rows))
    batch = {
        "input_ids": torch.stack([torch.full((LENGTH,), example["id"]) for example in examples]),
        "per_token": torch.stack([torch.full((LENGTH,), example["id"]) for example in examples]),
        "places": torch.stack([torch.full((LENGTH,), example["id"]) for example in examples]).expand(3, -1, -1),
        "shared": torch.arange(3),
    }
    if images:
        batch |= {
            "per_image": torch.tensor([[image[0], 0.5] for image in images]),
            "grid": torch.tensor([[1, len(image), 1] for image in images]),
            "patches": torch.tensor([[patch] for image in images for patch in image]),
            "per_row": torch.stack(
                [torch.tensor([[image[0], 1.0] for image in row] + [[0.0, 0.0]] * (most - len(row))) for row in rows]
            ),
        }
    return batch


def example(number, counts):
    return {"id": number, "images": [[100.0 * number + 10 * i + j for j in range(n)] for i, n in enumerate(counts)]}


ROWS = st.lists(st.lists(st.integers(1, 3), max_size=3), min_size=1, max_size=5)


def names(batch):
    return [name for name in batch if name != "input_ids"]


@settings(deadline=None)
@given(st.lists(ROWS, min_size=1, max_size=4), st.data())
def test_rows_get_what_they_own_in_every_batch(batches, data):
    ownership = Ownership(collator)
    for counts in batches:
        examples = [example(i + 1, row) for i, row in enumerate(counts)]
        batch = collator(examples)
        owned = ownership.of(batch, examples, names(batch))
        assert owned is not None, counts
        chosen = data.draw(st.lists(st.sampled_from(range(len(examples))), min_size=1, unique=True))
        chosen.sort()
        expected = collator([examples[i] for i in chosen])
        assert "shared" not in owned.parts
        for name, pick in owned.picks(chosen).items():
            found = batch[name].index_select(pick.axis, pick.index)
            if name not in expected:  # none of the rows has an image
                assert found.numel() == 0 or not found.any()
                continue
            if name == "per_row":  # filled up to the row with most images
                found = found[:, : expected[name].shape[1]]
            torch.testing.assert_close(found, expected[name], rtol=0, atol=0)


COUNTS = ([[1], [], [1, 2]], [[2], [1], []], [[1, 1, 1], [], []], [[1], [1], [1]])


def learned(collate, *counts):
    """Ownership that has learned from rows of such counts of patches."""
    ownership = Ownership(collate)
    ownership.learn([example(i + 1, row) for i, row in enumerate(counts)], names)
    return ownership


def test_asked_once_and_then_counted():
    calls = []

    def counting(examples):
        calls.append(len(examples))
        return collator(examples)

    ownership = learned(counting, [1], [1, 1], [], [2], [1])
    assert calls == [4, 1, 1, 1, 1]  # one row of each number of images, and one more
    for counts in COUNTS:
        examples = [example(i + 1, row) for i, row in enumerate(counts)]
        batch = collator(examples)
        assert ownership.of(batch, examples, names(batch)) is not None
    assert calls == [4, 1, 1, 1, 1]


@pytest.mark.parametrize("rows", [([1], [1, 1], []), ([1], [1]), ([], []), ([1],)], ids=str)
def test_what_a_batch_owns_does_not_depend_on_those_before_it(rows):
    """Workers see other batches than one process does, and a resumed run sees none of the first ones."""

    def fails_without_an_image(examples):
        if not any(example["images"] for example in examples):
            raise ValueError("no image")
        return collator(examples)

    def owned(ownership, counts):
        examples = [example(i + 1, row) for i, row in enumerate(counts)]
        batch = collator(examples)
        return ownership.of(batch, examples, names(batch))

    for collate in (collator, fails_without_an_image):
        one = learned(collate, *rows)
        in_order = [owned(one, counts) for counts in COUNTS]
        assert in_order == [owned(learned(collate, *rows), counts) for counts in COUNTS]
        assert in_order == [owned(one, counts) for counts in reversed(COUNTS)][::-1]


def test_one_image_in_every_row_says_nothing_about_the_next_batch():
    """Entries of rows and of images are the same there; three rows with three images among them are asked again."""
    ownership = Ownership(collator)
    for counts in ([[1], [1], [1]], [[], [1], [1, 1]]):
        examples = [example(i + 1, row) for i, row in enumerate(counts)]
        batch = collator(examples)
        owned = ownership.of(batch, examples, ["per_image"])
        assert owned.parts["per_image"] == (0, tuple(map(len, counts)))


def test_what_cannot_be_told():
    examples = [example(1, [1]), example(2, [1, 1]), example(3, [])]
    batch = collator(examples)

    def of(collate, given=batch, rows=examples, wanted=("per_image",)):
        return Ownership(collate).of(given, rows, wanted)

    def fails(rows):
        raise KeyError("needs the whole batch")

    def random(rows):
        return {**collator(rows), "per_image": torch.rand(sum(len(row["images"]) for row in rows), 2)}

    assert of(collator) is not None
    assert of(fails) is None
    assert of(random, random(examples)) is None  # other numbers each time: nobody knows whose they are
    assert of(collator, {**batch, "per_image": batch["per_image"].flip(0)}) is None  # in another order than the rows
    assert of(collator, {**batch, "per_image": [1, 2, 3]}) is None
    assert of(collator, {**batch, "per_image": torch.ones(7, 2)}) is None
    assert of(collator, rows=examples[:2]) is None
    hidden = [{"id": row["id"], "pictures": row["images"]} for row in examples]
    assert of(lambda rows: collator([{"id": r["id"], "images": r["pictures"]} for r in rows]), rows=hidden) is None


def test_asking_draws_no_number_that_training_would():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    examples = [example(1, [1]), example(2, [])]

    def draws(rows):
        torch.rand(5)
        return collator(rows)

    Ownership(draws).of(collator(examples), examples, ["per_image"])
    assert torch.equal(torch.rand(2), expected)
