"""The metrics of an evaluation as `evaluate.Metric`s, for use with that library; no Hub is needed.

Importing this module imports `evaluate`, which takes seconds; nothing else in the package does. What counts as the
answer in a text is decided in `answers`, as for the tasks, so the figures are those of `evaluate.accuracy(records)`.
"""

import re
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from .answers import CHOICES, first_match, last_number

_INPUTS = "predictions: generated texts; references: right answers, as text; one of each for every item."


class _AnswerMetric(evaluate.Metric):
    """Share of predictions whose answer equals the reference. `name` is the key of the result."""

    name: Any = ""  # plain attributes in the place of the library's properties
    description: Any = ""

    def __init__(self, **options: Any):
        # In memory: without it every instance leaves a lock and a file in the user's cache.
        super().__init__(**{"keep_in_memory": True, **options})

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(
            description=self.description, citation="", inputs_description=_INPUTS, features=features
        )

    def compute(self, *, predictions: Any = None, references: Any = None, **options: Any) -> dict[str, float] | None:
        """
        The share, under the metric's name.

        Raises:
            ValueError: there is nothing to compare, unequal numbers, or something that is not text.
        """
        if predictions is not None or references is not None:
            _check(predictions, references)
        return super().compute(predictions=predictions, references=references, **options)

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        _check(predictions, references)
        pairs = zip(predictions, references, strict=True)
        right = sum(self.answer(text) == self.reference(wanted) for text, wanted in pairs)
        return {self.name: right / len(references)}

    def answer(self, text: str) -> str:
        """What a generated text answers."""
        raise NotImplementedError

    def reference(self, text: str) -> str:
        """The right answer in the same form."""
        return text.strip()


class ExactMatch(_AnswerMetric):
    """Share of texts that equal the reference, white space at the ends aside."""

    name = "exact_match"
    description = "Share of predictions that equal the reference, white space at the ends aside."

    def answer(self, text: str) -> str:
        """The text itself."""
        return text.strip()


class ChoiceAccuracy(_AnswerMetric):
    """
    Share of texts whose first option name is the right one; a text that names none is wrong (LLM-Adapters).

    Args:
        task: one of the eight commonsense tasks.
        options: of `evaluate.Metric`.

    Raises:
        ValueError: unknown task.
    """

    name = "accuracy"
    description = "Share of predictions whose first option name is the reference; naming none is wrong."

    def __init__(self, task: str, **options: Any):
        if task not in CHOICES:
            raise ValueError(f"{task!r} is no commonsense task. Use one of {', '.join(CHOICES)}.")
        self.pattern = re.compile(CHOICES[task])
        super().__init__(**options)

    def answer(self, text: str) -> str:
        """The first option name, "" where there is none."""
        return first_match(self.pattern, text)


class NumberAccuracy(_AnswerMetric):
    """Share of texts whose number (after "####", else the last one) equals that of the reference."""

    name = "number_accuracy"
    description = 'Share of predictions whose number (after "####", else the last one) equals that of the reference.'

    def answer(self, text: str) -> str:
        """The number as plain digits, "" where there is none."""
        return last_number(text)

    def reference(self, text: str) -> str:
        """The number of the reference."""
        return last_number(text)


def _check(predictions: Any, references: Any) -> None:
    """Say in plain words what `evaluate` would fail on later, or score silently."""
    n_predictions, n_references = (0 if given is None else len(given) for given in (predictions, references))
    if not n_references or n_predictions != n_references:
        raise ValueError(f"{n_predictions} predictions cannot be compared with {n_references} references.")
    for what, given in (("prediction", predictions), ("reference", references)):
        other = [value for value in given if not isinstance(value, str)]
        if other:
            raise ValueError(f"The {what} {other[0]!r} is not text; give {what}s as strings.")
