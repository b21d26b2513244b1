"""Evaluate a model on a task: generate answers, rank answer options, or score the reference completions.

tasks (`tasks`) -> items -> batches, sorted by length -> records. Records do not depend on the batch size
in float32; in bfloat16 matrix products do, a little.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..rendering.forms import RowOptions
from ..rendering.rendering import Rendering
from .readers import PlainReader, Reader
from .scoring import TokenizedRow, labelled_row, tokenize_row

MODES = ("generate", "rank", "nll")


@dataclass(frozen=True)
class Item:
    """
    One question.

    Attributes:
        prompt: text exactly as in training (template applied, a chat template rendered).
        reference: the right answer: the name of an option ("answer2", "true"), a completion or a number.
        options: completions to rank, as text after the prompt; empty where the answer is free.
        completion: text that training teaches after the prompt; "" where it is the reference itself.
        row: the row it was made of, in a form that training takes; all of its answers are scored in mode "nll".
    """

    prompt: str
    reference: str
    options: tuple[str, ...] = ()
    completion: str = ""
    row: dict[str, Any] | None = None


@dataclass(frozen=True)
class Task:
    """
    Questions of one kind.

    Attributes:
        name: such as "boolq".
        items: the questions.
        extract: from generated text to what is compared with `Item.reference`; "" where nothing is found.
        max_new_tokens: longest generated answer, in tokens.
        special_tokens: whether the tokenizer adds its special tokens (and training an end token); not for rendered
            chat templates, which have their own.
        first_match: whether `extract` takes the first thing it finds, so that generation may end there.
        metric: name of the metric the mean of `Record.correct` is.
        dataset: public id or file name of the data.
        split: split of the data, None where it is not known.
        n_rows: rows of the data that the items were drawn from, None where it is not known.
        row_options: what the training run said about its rows.
    """

    name: str
    items: list[Item]
    extract: Callable[[str], str]
    max_new_tokens: int
    special_tokens: bool = True
    first_match: bool = False
    metric: str = "exact_match"
    dataset: str = ""
    split: str | None = "test"
    n_rows: int | None = None
    row_options: RowOptions = field(default_factory=RowOptions)


@dataclass(frozen=True)
class Record:
    """
    The outcome for one item.

    Attributes:
        index: of the item in its task.
        prediction: what was compared with the reference.
        reference: the right answer.
        correct: whether the two are equal.
        nll: negative log-likelihood of the reference completion given the prompt, in nats, where it was scored.
        n_tokens: tokens of the completion behind `nll`.
        text: what the model wrote, in mode "generate".
        scores: log-likelihood of every option in nats, in mode "rank".
        prediction_per_token: the option with the highest mean log-likelihood of a token, in mode "rank".
    """

    index: int
    prediction: str
    reference: str
    correct: bool
    nll: float | None = None
    n_tokens: int | None = None
    text: str | None = None
    scores: tuple[float, ...] | None = None
    prediction_per_token: str | None = None


def evaluate_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    mode: str = "generate",
    batch_size: int = 32,
    advance: Callable[[int], None] | None = None,
    done: dict[int, Record] | None = None,
    save: Callable[[list[Record]], None] | None = None,
    num_beams: int = 1,
    reader: Reader | None = None,
) -> list[Record]:
    """
    Answer every item of a task.

    Args:
        model: a causal language model or PeftModel; it is put into evaluation mode.
        tokenizer: its tokenizer.
        task: the questions.
        mode: "generate" (write an answer and extract it), "rank" (the most likely option) or "nll" (score the
            answers of the row on the tokens and labels of the training loss; `correct` says whether greedy generation
            would write exactly them).
        batch_size: items at a time.
        advance: called with the number of items finished, those in `done` included, for a progress bar.
        done: records of an interrupted evaluation, by index; they are returned and not computed again.
        save: called with the records of every batch as soon as it is finished.
        num_beams: beams in mode "generate"; 1 is greedy.
        reader: what reads and writes; None is the model as it is.

    Returns:
        One record for each item, in their order.

    Raises:
        ValueError: unknown mode, a batch size or number of beams below 1, an empty task, or items without options to
            rank.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown. Use one of {', '.join(MODES)}.")
    if batch_size < 1 or num_beams < 1:
        raise ValueError(f"batch_size={batch_size} and num_beams={num_beams} must be at least 1.")
    if not task.items:
        raise ValueError(f"The task {task.name!r} has no items.")
    if mode == "rank" and (without := [number for number, item in enumerate(task.items, 1) if len(item.options) < 2]):
        raise ValueError(
            f"The task {task.name!r} has items without options to rank, item {without[0]} among them. Use mode "
            f"'generate' or 'nll', or give the rows of a file a column `options`: a list of completions as text, with "
            f"the `completion` of the row among them, once."
        )
    model.eval()
    reader = reader or PlainReader(model, tokenizer)
    records = {index: record for index, record in (done or {}).items() if index < len(task.items)}
    if records and advance is not None:
        advance(len(records))
    left = [index for index in range(len(task.items)) if index not in records]
    left.sort(key=lambda index: len(task.items[index].prompt))
    for begin in range(0, len(left), batch_size):
        batch = left[begin : begin + batch_size]
        new = _BATCH[mode](reader, tokenizer, task, batch, num_beams)
        records.update((record.index, record) for record in new)
        if save is not None:
            save(new)
        if advance is not None:
            advance(len(batch))
    return [records[index] for index in range(len(task.items))]


def accuracy(records: Sequence[Record]) -> float:
    """
    Share of correct records.

    Raises:
        ValueError: there are none.
    """
    if not records:
        raise ValueError("There are no records, so there is no accuracy.")
    return sum(record.correct for record in records) / len(records)


def _generate(reader: Reader, tokenizer: Any, task: Task, batch: list[int], num_beams: int) -> list[Record]:
    texts = reader.answers(
        [task.items[index].prompt for index in batch],
        max_new_tokens=task.max_new_tokens,
        batch_size=len(batch),
        num_beams=num_beams,
        special_tokens=task.special_tokens,
        stop=task.extract if task.first_match else None,
    )
    records = []
    for index, text in zip(batch, texts, strict=True):
        prediction, reference = task.extract(text), task.items[index].reference
        records.append(Record(index, prediction, reference, prediction == reference, text=text))
    return records


def _rank(reader: Reader, tokenizer: Any, task: Task, batch: list[int], num_beams: int) -> list[Record]:
    rows = [
        tokenize_row(tokenizer, task.items[index].prompt, task.items[index].options, task.special_tokens)
        for index in batch
    ]
    records = []
    for index, scores in zip(batch, reader.score(rows), strict=True):
        item = task.items[index]
        names = [task.extract(option) for option in item.options]
        best = max(range(len(names)), key=lambda o: scores[o].log_likelihood)
        per_token = max(range(len(names)), key=lambda o: scores[o].log_likelihood / scores[o].n_tokens)
        if item.reference not in names:
            raise ValueError(
                f"Item {index} has the answer {item.reference!r}, which is not among its options {names}."
            )
        right = names.index(item.reference)
        records.append(
            Record(
                index,
                names[best],
                item.reference,
                names[best] == item.reference,
                nll=-scores[right].log_likelihood,
                n_tokens=scores[right].n_tokens,
                scores=tuple(score.log_likelihood for score in scores),
                prediction_per_token=names[per_token],
            )
        )
    return records


def _nll(reader: Reader, tokenizer: Any, task: Task, batch: list[int], num_beams: int) -> list[Record]:
    rows = _labelled(tokenizer, task, batch)
    records = []
    for index, (score,) in zip(batch, reader.score(rows), strict=True):
        reference = task.items[index].reference
        prediction = reference if score.greedy else ""
        records.append(
            Record(index, prediction, reference, score.greedy, nll=-score.log_likelihood, n_tokens=score.n_tokens)
        )
    return records


def _labelled(tokenizer: Any, task: Task, batch: list[int]) -> list[TokenizedRow]:
    """Token ids of items, with the tokens that training would score."""
    items = [task.items[index] for index in batch]
    rendering = Rendering(task.row_options, tokenizer)
    examples = iter(rendering.examples([item.row for item in items if item.row is not None]))
    rows = []
    for item in items:
        if item.row is not None:
            rows.append(labelled_row(**next(examples)))
            continue
        completion = item.completion or item.reference
        if task.special_tokens and not completion.endswith(tokenizer.eos_token):
            completion += tokenizer.eos_token
        rows.append(tokenize_row(tokenizer, item.prompt, [completion], task.special_tokens))
    return rows


_BATCH = {"generate": _generate, "rank": _rank, "nll": _nll}
