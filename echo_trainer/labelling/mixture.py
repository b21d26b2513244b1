"""Labelled and taught rows in one data set whose order is that of training: so many of each in every batch.

Rows are drawn without putting them back; when all of a kind were seen they are shuffled anew. The order is a function
of seed and sizes, and training goes through it from beginning to end, so a resumed run sees what it would have.
"""

import math
from collections.abc import Sequence

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets

from ..method.soft_labels import TOP_LOGS, TOP_TOKENS
from .label import Label

_FEATURES = Features({"input_ids": List(Value("int64")), "labels": List(Value("int64"))})
_SOFT = Features({TOP_TOKENS: List(List(Value("int64"))), TOP_LOGS: List(List(Value("float32")))})


def taught_rows(labels: Sequence[Label], tokens: Sequence[dict[str, list[int]]], soft: bool) -> Dataset:
    """
    A data set of answered prompts.

    Args:
        labels: those that are trained on.
        tokens: `input_ids` and `labels` of each.
        soft: whether the teacher's distributions go with them.

    Raises:
        ValueError: a row has another number of tokens to learn than the teacher was asked about.
    """
    columns = {name: [each[name] for each in tokens] for name in ("input_ids", "labels")}
    if not soft:
        return Dataset.from_dict(columns, features=_FEATURES)
    for label, each in zip(labels, tokens, strict=True):
        n = sum(value != -100 for value in each["labels"][1:])
        if label.top is None or label.logs is None or len(label.top) != n:
            raise ValueError(
                f"The label of prompt {label.index} holds {len(label.top or [])} distributions, and its answer has "
                f"{n} tokens: it was made with another tokenizer, or without labels='soft'. Label anew."
            )
    columns |= {TOP_TOKENS: [each.top for each in labels], TOP_LOGS: [each.logs for each in labels]}
    return Dataset.from_dict(columns, features=Features({**_FEATURES, **_SOFT}))


def batches_for(epochs: float, n_taught: int, batch_size: int, parts: tuple[int, int]) -> int:
    """Batches in which every taught row is seen `epochs` times."""
    return max(1, math.ceil(epochs * n_taught / of_each(batch_size, parts)[1]))


def mixture(
    labelled: Dataset | None, taught: Dataset, parts: tuple[int, int], batch_size: int, n_batches: int, seed: int
) -> Dataset:
    """
    `n_batches` times `batch_size` rows, in the order in which they are trained on.

    Args:
        labelled: with `input_ids` and `labels`; None where there are none.
        taught: from `taught_rows`.
        parts: labelled and taught rows of the smallest batch with the ratio.
        batch_size: rows of a batch on each device.
        n_batches: batches on all devices together.
        seed: of the order.

    Raises:
        ValueError: the batch size is no multiple of the parts, or rows of a kind are missing.
    """
    n_labelled, n_taught = of_each(batch_size, parts)
    if n_labelled and not labelled:
        raise ValueError(
            f"The ratio {parts[0]}:{parts[1]} asks for labelled rows, and there are none. Give the training data, or "
            f"write ratio='0:1'."
        )
    first = 0 if labelled is None else len(labelled)
    of_labelled = _drawn(first, n_labelled * n_batches, np.random.default_rng([seed % 2**64, 0]))
    of_taught = _drawn(len(taught), n_taught * n_batches, np.random.default_rng([seed % 2**64, 1])) + first
    order = np.concatenate(
        [of_labelled.reshape(n_batches, n_labelled), of_taught.reshape(n_batches, n_taught)], axis=1
    )
    if labelled is None:
        return taught.select(order.ravel())
    kept = labelled.with_format(None).select_columns(list(_FEATURES)).cast(_FEATURES)
    return concatenate_datasets([kept, taught]).select(order.ravel())


def of_each(batch_size: int, parts: tuple[int, int]) -> tuple[int, int]:
    """
    Labelled and taught rows of a batch.

    Raises:
        ValueError: the batch size is no multiple of the parts.
    """
    whole = sum(parts)
    if batch_size % whole:
        raise ValueError(
            f"The ratio {parts[0]}:{parts[1]} divides a batch into {whole} parts, and "
            f"`per_device_train_batch_size` is {batch_size}. Write a multiple of {whole}."
        )
    times = batch_size // whole
    return parts[0] * times, parts[1] * times


def _drawn(n: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """`count` of the numbers below n: one permutation after another."""
    if not count:
        return np.zeros(0, np.int64)
    rounds = -(-count // n)
    return np.concatenate([generator.permutation(n) for _ in range(rounds)])[:count]
