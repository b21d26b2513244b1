"""Labelling: prompts and a teacher in, a file of answers with their scores out; goes on where it was stopped.

Prompts are answered in batches that depend on nothing but the prompts and the options, and each batch is written as a
whole: an interrupted labelling ends with the same file, sampled answers included.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets

from ..evaluation.line_file import LineFile
from ..rendering.forms import RowOptions
from ..rendering.rendering import Rendering
from ..run.resume import base_fingerprint
from .options import DistillOptions
from .prompts import Prompt
from .teacher import Judged, Teacher
from .vote import EMPTY, Written, vote

LABELS = "labels.jsonl"
UNSURE = "unsure"


@dataclass(frozen=True)
class Label:
    """
    An answer to a prompt.

    Attributes:
        index: of the prompt.
        row: prompt and completion, in a form that training takes.
        confidence: in [0, 1]; see `DistillOptions`.
        log_likelihood: of the answer's tokens by the teacher, in nats, the end token with them; None of a faulty one.
        n_tokens: how many they are.
        votes: how many of the samples say the same.
        fault: why nobody should learn it ("empty", "unfinished"), None where there is no reason.
        top, logs: the teacher's distribution at each of the tokens, for soft labels; see `method.soft_labels`.
    """

    index: int
    row: dict[str, Any]
    confidence: float
    log_likelihood: float | None
    n_tokens: int
    votes: int
    fault: str | None
    top: list[list[int]] | None = None
    logs: list[list[float]] | None = None

    def left_out(self, min_confidence: float) -> str | None:
        """Why it is not trained on, None where it is."""
        return self.fault or (UNSURE if self.confidence < min_confidence else None)


def label(
    teacher: Teacher,
    prompts: Sequence[Prompt],
    path: Path,
    options: DistillOptions,
    seed: int,
    advance: Callable[[int], Any] | None = None,
    processes: int = 1,
) -> list[Label]:
    """
    Answer every prompt.

    Args:
        teacher: who answers.
        prompts: from `read_prompts`.
        path: JSON Lines: what decides the answers, then a line for each. One that is there is gone on with.
        options: how they are answered; what is about training is not looked at.
        seed: of samples.
        advance: called with the number of prompts answered, those in the file included, for a progress bar.
        processes: that this is called in. Several can read finished labels, and not make them.

    Returns:
        A label for each prompt, in their order.

    Raises:
        ValueError: the file holds labels of another teacher, other prompts or options, or several processes would
            label.
    """
    identity = _identity(teacher, prompts, options, seed)
    advice = "Name another output folder, or delete that file to label anew."
    file = LineFile(path, identity, what="labels", job="labelling", advice=advice)
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number].text))
    size = options.label_batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    whole = 0  # batches; of one that was cut off nothing is kept
    while whole < len(batches) and len(file.lines) >= sum(map(len, batches[: whole + 1])):
        whole += 1
    if processes > 1 and whole < len(batches):
        raise ValueError(
            f"{len(prompts)} prompts are to be answered in one process, and there are {processes}. Label with "
            f"`echo-trainer distill RUN --label_only true ...` in one process; several may train on finished labels."
        )
    file.keep(sum(map(len, batches[:whole])))
    found = [Label(**line) for line in file.lines]
    if advance is not None:
        advance(len(found))
    for number, batch in enumerate(batches[whole:], whole):
        new = _label_batch(teacher, batch, prompts, options, seed * 1_000_003 + number)
        file.append([_line(each) for each in new])
        found += new
        if advance is not None:
            advance(len(new))
    return sorted(found, key=lambda each: each.index)


def counts(labels: Sequence[Label], min_confidence: float) -> dict[str, int]:
    """How many prompts there are, how many answers are trained on, and why the others are not."""
    reasons = [each.left_out(min_confidence) for each in labels]
    return {
        "prompts": len(labels),
        "kept": reasons.count(None),
        **{reason: reasons.count(reason) for reason in (EMPTY, "unfinished", UNSURE)},
    }


def examples(
    rows: Sequence[dict[str, Any]], tokenizer: Any, options: RowOptions | None = None
) -> list[dict[str, list[int]]]:
    """`input_ids` and `labels` of rows, as training makes them; without options, of answered prompts."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return Rendering(options or RowOptions(), tokenizer).examples(rows)
    finally:
        if shown:
            datasets.enable_progress_bars()


def _label_batch(
    teacher: Teacher, batch: list[int], prompts: Sequence[Prompt], options: DistillOptions, seed: int
) -> list[Label]:
    asked = [prompts[index] for index in batch]
    answers = teacher.write(
        asked, max_new_tokens=options.max_new_tokens, n_samples=options.n_samples, temperature=options.temperature,
        seed=seed,
    )  # fmt: skip
    taken = [vote(each) for each in answers]
    rows = [prompt.answered(_said(answer, prompt)) for prompt, (answer, _) in zip(asked, taken, strict=True)]
    good = [place for place, (answer, _) in enumerate(taken) if answer.fault is None]
    judged: dict[int, Judged] = {}
    if good:
        top = options.soft_tokens if options.labels == "soft" else 0
        read = examples([rows[place] for place in good], teacher.tokenizer)
        judged = dict(zip(good, teacher.judge(read, top, options.soft_temperature), strict=True))
    return [
        _labelled(index, rows[place], *taken[place], judged.get(place), options) for place, index in enumerate(batch)
    ]


def _said(answer: Written, prompt: Prompt) -> str:
    """The answer's text; what stands around a message is the chat template's."""
    return answer.text if prompt.special_tokens else answer.text.strip()


def _labelled(
    index: int, row: dict[str, Any], answer: Written, votes: int, judged: Judged | None, options: DistillOptions
) -> Label:
    if judged is None or not judged.n_tokens:
        return Label(index, row, 0.0, None, 0, votes, answer.fault or EMPTY)
    share = votes / options.n_samples
    sure = math.exp(judged.log_likelihood / judged.n_tokens) if options.n_samples == 1 else share
    soft: dict[str, Any] = {}
    if options.labels == "soft":
        soft = {"top": judged.top, "logs": [[round(value, 6) for value in each] for each in judged.logs]}
    return Label(index, row, sure, judged.log_likelihood, judged.n_tokens, votes, None, **soft)


def _line(label: Label) -> dict[str, Any]:
    """A label as JSON; what stands only in soft ones is left out of others."""
    return {key: value for key, value in asdict(label).items() if value is not None or key not in ("top", "logs")}


def _identity(teacher: Teacher, prompts: Sequence[Prompt], options: DistillOptions, seed: int) -> dict[str, Any]:
    """Everything that decides an answer."""
    asked = hashlib.sha256()
    for prompt in prompts:
        asked.update(json.dumps([prompt.text, prompt.special_tokens, prompt.row], sort_keys=True).encode())
    soft = {"soft_tokens": options.soft_tokens, "soft_temperature": options.soft_temperature}
    sampled = {"temperature": options.temperature, "seed": seed}
    return {
        "teacher": teacher.kind,
        "weights": teacher.digest(),
        **base_fingerprint(teacher.model),
        "dtype": str(teacher.setup.model.dtype),
        "prompts": asked.hexdigest()[:16],
        "labels": options.labels,
        "n_samples": options.n_samples,
        "max_new_tokens": options.max_new_tokens,
        "label_batch_size": options.label_batch_size,
        **(soft if options.labels == "soft" else {}),
        **(sampled if options.n_samples > 1 else {}),
    }
