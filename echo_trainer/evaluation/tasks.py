"""Tasks to evaluate on: the eight commonsense tasks, any prompt-completion data with exact match, and maths problems.

The prompts are made by the templates of training (`templates.py`), so that the two never differ by a space.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ..rendering.columns import from_columns
from ..rendering.forms import COLUMNS, Form, RowOptions, form_of
from ..rendering.mapping import as_dataset
from ..rendering.prompts import Parts, parts_of
from ..rendering.rendering import Rendering
from ..templates import TEMPLATES
from .answers import CHOICES, first_match, last_number
from .data import FILES, folder_rows, hub_rows, instruction_row, read_rows, task_file
from .evaluate import Item, Task

COMMONSENSE = tuple(CHOICES)
GSM8K = "gsm8k"
CHOICE_TOKENS, NUMBER_TOKENS = 32, 256
_ANSWER = "the correct answer is {}"


def commonsense_task(
    name: str,
    rows: Sequence[dict[str, Any]],
    template: str = "alpaca",
    limit: int | None = None,
    seed: int = 0,
    tokenizer: Any = None,
) -> Task:
    """
    One of the eight commonsense tasks.

    Args:
        name: one of `COMMONSENSE`.
        rows: in the LLM-Adapters format (`instruction`, `input`, `output`, `answer`), or in the columns of the public
            dataset of the task.
        template: as in training, one of `templates.TEMPLATES`.
        limit: evaluate this many items, drawn with `seed`; None is all.
        seed: seed of that draw.
        tokenizer: needed by chat templates.

    Raises:
        ValueError: unknown task or template, or a row without an answer among its options.
    """
    if name not in CHOICES:
        raise ValueError(f"{name!r} is no commonsense task. Use one of {', '.join(COMMONSENSE)}.")
    extract = partial(first_match, re.compile(CHOICES[name]))
    items, make = [], _template(template)
    for number, row in _drawn(rows, limit, seed):
        with _named(name, number):
            row = instruction_row(name, row)
            names = _option_names(name, row)
            answer = str(row.get("answer") or extract(row["output"]))
            if answer not in names:
                raise ValueError(f"the answer {answer!r} is not among its options {names}.")
            row = make(row)
            parts = parts_of(row, Rendering(RowOptions(), tokenizer))
        options = tuple(_ANSWER.format(option) for option in names)
        items.append(Item(parts.prompt, answer, options, parts.completion, row))
    return Task(
        name, items, extract, CHOICE_TOKENS, special_tokens=template != "chat",
        first_match=True, metric="accuracy",
    )  # fmt: skip


def prompt_completion_task(
    name: str,
    rows: Sequence[dict[str, Any]],
    limit: int | None = None,
    seed: int = 0,
    max_new_tokens: int = 64,
    template: str | None = None,
    tokenizer: Any = None,
    row_options: RowOptions | None = None,
) -> Task:
    """
    Exact match of what is generated with the last answer, white space at the ends aside.

    Args:
        name: name of the task.
        rows: in a form that training takes (`prompt` and `completion`, `messages`, `conversations`, `text` with an
            answer marker; with `tools` and `chat_template_kwargs`), or with the columns that `template` knows.
        limit: evaluate this many items, drawn with `seed`; None is all.
        seed: seed of that draw.
        max_new_tokens: longest answer, in tokens.
        template: one of `templates.TEMPLATES`, or None where the rows have prompts and completions already.
        tokenizer: needed by messages and chat templates.
        row_options: what the training run said about its rows.
    """
    options = row_options or RowOptions()
    items, special_tokens = _templated(name, rows, template, limit, seed, Rendering(options, tokenizer))
    return Task(
        name,
        [Item(parts.prompt, parts.answer.strip(), (), parts.completion, row) for _, row, parts in items],
        str.strip,
        max_new_tokens,
        special_tokens=special_tokens,
        row_options=options,
    )


def gsm8k_task(
    rows: Sequence[dict[str, Any]],
    name: str = GSM8K,
    template: str = "alpaca",
    limit: int | None = None,
    seed: int = 0,
    max_new_tokens: int = NUMBER_TOKENS,
    tokenizer: Any = None,
    row_options: RowOptions | None = None,
) -> Task:
    """
    Maths problems whose answer is a number: after "####", or the last number written.

    Args:
        rows: with `question` and `answer` (GSM8K), `instruction` and `output`, or in a form that training takes.
        name: name of the task.
        template: as in training, one of `templates.TEMPLATES`. Not used for rows with prompts.
        limit: evaluate this many items, drawn with `seed`; None is all.
        seed: seed of that draw.
        max_new_tokens: longest answer, in tokens.
        tokenizer: needed by messages and chat templates.
        row_options: what the training run said about its rows.

    Raises:
        ValueError: a reference answer holds no number.
    """
    options = row_options or RowOptions()
    whole = not rows or form_of(rows[0], options) is Form.OTHER
    rendering = Rendering(options, tokenizer)
    found, special_tokens = _templated(name, rows, template if whole else None, limit, seed, rendering)
    items = []
    for place, row, parts in found:
        with _named(name, place):
            number = last_number(parts.answer)
            if not number:
                raise ValueError(f"there is no number in its answer {parts.answer[-80:]!r}.")
        items.append(Item(parts.prompt, number, (), parts.completion, row))
    return Task(
        name, items, last_number, max_new_tokens, special_tokens=special_tokens, metric="accuracy", row_options=options
    )  # fmt: skip


def load_tasks(
    spec: Sequence[str],
    data_dir: str | Path | None = None,
    *,
    template: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    tokenizer: Any = None,
    max_new_tokens: int | None = None,
    row_options: RowOptions | None = None,
    columns: tuple[str, str] | None = None,
) -> list[Task]:
    """
    Tasks by name.

    Args:
        spec: names: those of `COMMONSENSE`, "commonsense" for all of these that `data_dir` has (all eight without
            it), "gsm8k", or the path of a file (`data.FILES`) with rows in a form that training takes.
        data_dir: folder with files NAME-test.json (LLM-Adapters) or NAME-test.jsonl; None reads the public datasets.
        template: as in training; None is "alpaca", and no template for files of prompts and completions.
        limit: items of each task, drawn with `seed`; None is all.
        seed: seed of that draw.
        tokenizer: needed by chat templates.
        max_new_tokens: longest answer in tokens, instead of the task's own.
        row_options: what the training run said about its rows; for files and gsm8k.
        columns: names of the columns of prompt and completion in files.

    Raises:
        ValueError: a task is unknown, or its file is empty or holds something else.
        FileNotFoundError: `data_dir` has no file for a task.
    """
    tasks = []
    for name in _expanded(spec, data_dir):
        drawn: dict[str, Any] = {"limit": limit, "seed": seed, "tokenizer": tokenizer}
        if Path(name).suffix in FILES:
            given: dict[str, Any] = {"max_new_tokens": max_new_tokens} if max_new_tokens else {}
            rows = read_rows(Path(name))
            if columns is not None:
                with _named(name, 1):
                    rows = list(map(from_columns(*columns), rows))
            given |= {"row_options": row_options}
            task = prompt_completion_task(Path(name).stem, rows, template=template, **drawn, **given)
            source = {"dataset": Path(name).name, "split": None}  # nobody said which it is
        elif name in (*COMMONSENSE, GSM8K):
            rows, source = hub_rows(name) if data_dir is None else folder_rows(name, Path(data_dir))
            make: Callable[..., Task] = gsm8k_task if name == GSM8K else commonsense_task
            arguments = (rows,) if name == GSM8K else (name, rows)
            said = {"row_options": row_options} if name == GSM8K else {}
            task = make(*arguments, template=template or "alpaca", **drawn, **said)
        else:
            raise ValueError(
                f"The task {name!r} is unknown. Use {', '.join(COMMONSENSE)}, commonsense (all of them), {GSM8K}, or "
                f"the path of a file ({', '.join(FILES)}) with prompts and completions."
            )
        changed = {**source, "n_rows": len(rows), **({"max_new_tokens": max_new_tokens} if max_new_tokens else {})}
        tasks.append(Task(**{**vars(task), **changed}))
    return tasks


def _template(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    if name not in TEMPLATES:
        raise ValueError(f"The template {name!r} is unknown. Use one of {', '.join(TEMPLATES)}.")
    return TEMPLATES[name]


def _templated(
    name: str, rows: Sequence[dict[str, Any]], template: str | None, limit: int | None, seed: int, rendering: Rendering
) -> tuple[list[tuple[int, dict[str, Any], Parts]], bool]:
    """Number, row and parts of every drawn row, and whether the tokenizer adds its special tokens to them."""
    found, make, special_tokens = [], None if template is None else _template(template), True
    for number, row in _drawn(rows if make is not None else _as_trained(rows, rendering.options), limit, seed):
        with _named(name, number):
            example = row if make is None else make(row)
            parts = parts_of(example, rendering)
            if not parts.prompt:
                raise ValueError("its prompt is empty, so there is nothing to answer.")
        special_tokens = parts.special_tokens
        found.append((number, example, parts))
    return found, special_tokens


def _as_trained(rows: Sequence[dict[str, Any]], options: RowOptions) -> list[dict[str, Any]]:
    """The columns of rows that decide how they are written, with the values that they have in a dataset."""
    known = (*COLUMNS, options.dataset_text_field)
    kept = [{name: row[name] for name in known if name in row} for row in rows]
    if not any("tools" in row or "chat_template_kwargs" in row for row in kept):
        return [found or dict(row) for found, row in zip(kept, rows, strict=True)]
    return [{name: value for name, value in row.items() if value is not None} for row in as_dataset(kept).to_list()]


@contextmanager
def _named(task: str, number: int) -> Iterator[None]:
    """Say which row of a task an error is about, counted from 1."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"Row {number} of {task}: {error}") from error


def _drawn(rows: Sequence[dict[str, Any]], limit: int | None, seed: int) -> list[tuple[int, dict[str, Any]]]:
    """`limit` rows drawn with `seed`, in their order, each with its number, counted from 1; all without a limit."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} leaves no items. Use at least 1, or None for all.")
    if limit is None or limit >= len(rows):
        return list(enumerate(rows, start=1))
    chosen = random.Random(seed).sample(range(len(rows)), limit)
    return [(index + 1, rows[index]) for index in sorted(chosen)]


def _option_names(task: str, row: dict[str, Any]) -> list[str]:
    """Options of a row, from the end of its instruction ("Answer format: answer1/answer2")."""
    listed = row["instruction"].rpartition("Answer format:")[2].strip().split("/")
    known = CHOICES[task].split("|")
    return listed if len(listed) > 1 and set(listed) <= set(known) else known


def _expanded(spec: Sequence[str], data_dir: str | Path | None) -> list[str]:
    """The names with "commonsense" written out, each once."""
    if isinstance(spec, str):
        spec = [spec]
    names = []
    for name in spec:
        if name != "commonsense":
            names.append(name)
            continue
        present = [task for task in COMMONSENSE if data_dir is None or task_file(task, Path(data_dir)) is not None]
        if not present:
            raise FileNotFoundError(f"{data_dir} has no NAME-test.json of a commonsense task.")
        names += present
    if not names:
        raise ValueError("No task is named. Use for example `commonsense`.")
    return list(dict.fromkeys(names))
