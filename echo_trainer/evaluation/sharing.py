"""Whether keys and values of a text may be used for what follows it, found out by trying it on the model.

Scores with and without sharing must agree as far as rounding goes. States of another kind (linear attention), windows,
biases by position and kernels of their own show in them, whatever they are called. One try shows something about rows
of the same form that are not longer; each form is tried when it first comes, and longer rows again.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..passes.memory import is_out_of_memory

Scorer = Callable[[Sequence[Any]], list[list[Any]]]


class How(StrEnum):
    """How rows are scored: with shared keys and values, each completion with its prompt, or each in a batch alone."""

    SHARED = "shared"
    WHOLE = "whole"
    ALONE = "alone"


_proved: "WeakKeyDictionary[Any, dict[Hashable, tuple[float, How]]]" = WeakKeyDictionary()
"""By model and form of the rows: the tokens up to which it was tried, and what came out."""


def how_to_score(model: Any, form: Hashable, rows: Sequence[Any], shared: Scorer, whole: Scorer) -> How:
    """
    The cheapest way that gives every text the score it has alone.

    Args:
        model: the model below its adapter.
        form: what makes one batch share in another way than the next.
        rows: the batch, of `scoring.TokenizedRow`.
        shared, whole: score rows with and without sharing.
    """
    known = _proved.setdefault(model, {})
    length = max(len(ids) for row in rows for ids in row.sequences)
    tried, how = known.get(form, (0, How.SHARED))
    if length > tried and how is not How.ALONE:
        known[form] = length, max(how, _try(model, _few(rows), shared, whole), key=list(How).index)
    return known[form][1]


def _few(rows: Sequence[Any]) -> list[Any]:
    """The longest and the shortest row, with the two longest completions each."""
    by_length = sorted(rows, key=lambda row: -max(map(len, row.sequences)))
    chosen = by_length if len(by_length) < 3 else [by_length[0], by_length[-1]]
    return [replace(row, sequences=sorted(row.sequences, key=len, reverse=True)[:2]) for row in chosen]


def _try(model: Any, rows: list[Any], shared: Scorer, whole: Scorer) -> How:
    roundoff = torch.finfo(model.dtype).eps / 2
    unit = (2 if roundoff > 1e-5 else 64) * roundoff

    def agree(left: list[list[Any]], right: list[list[Any]], noise: float = 0.0) -> bool:
        return all(
            abs(a.log_likelihood - b.log_likelihood) <= max(4 * noise, unit * (b.n_tokens + abs(b.log_likelihood)))
            for a, b in _pairs(left, right)
        )

    expected = whole(rows)
    alone = [[whole([replace(row, sequences=[ids])])[0][0] for ids in row.sequences] for row in rows]
    if not agree(alone, expected):  # a rotary embedding that depends on the longest text of the batch
        return How.ALONE
    try:
        found = shared(rows)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return How.WHOLE
    noise = max(abs(a.log_likelihood - b.log_likelihood) for a, b in _pairs(alone, expected))
    return How.SHARED if agree(found, expected, noise) else How.WHOLE


def _pairs(left: list[list[Any]], right: list[list[Any]]) -> list[tuple[Any, Any]]:
    return [pair for row in zip(left, right, strict=True) for pair in zip(*row, strict=True)]
