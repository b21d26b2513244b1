"""The most frequent answer, and what has no vote."""

import pytest

from echo_trainer.labelling.vote import Written, vote


@pytest.mark.parametrize(("answers", "text", "votes"), [
    ([" a"], " a", 1),
    ([" a", " b", " b"], " b", 2),
    ([" a", " b", "a ", " b"], " a", 2),  # of equals the first; white space aside
    ([" a", "", " ", "", ""], " a", 1),
    (["|c", "|c", "|c", " a"], " a", 1),
    (["", "|c"], "", 0),
])  # fmt: skip
def test_vote(answers, text, votes):
    """`|` marks answers that are cut off."""
    written = [Written(answer.removeprefix("|"), not answer.startswith("|")) for answer in answers]
    taken, count = vote(written)
    assert (taken.text, count) == (text, votes)


def test_faults():
    assert [Written(text, done).fault for text, done in ((" a", True), (" a", False), (" ", True))] == [
        None, "unfinished", "empty",
    ]  # fmt: skip
