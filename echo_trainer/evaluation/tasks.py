"""Tasks to evaluate on: the eight commonsense tasks, any prompt-completion data with exact match, and maths problems.

The prompts are made by the templates of training (`templates.py`), so that the two never differ by a space.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..rendering.columns import from_columns
from ..rendering.forms import Form, RowOptions, form_of
from ..rendering.prompts import parts_of
from ..rendering.rendering import Rendering
from .answers import CHOICES, first_match, last_number
from .data import FILES, folder_rows, hub_rows, instruction_row, read_rows, task_file
from .evaluate import Item, Task
from .rows import choices_of, drawn_rows, naming_row, template_of, templated_rows

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
    items, make = [], template_of(template)
    for number, row in drawn_rows(rows, limit, seed):
        with naming_row(name, number):
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
            answer marker; with `tools` and `chat_template_kwargs`), or with the columns that `template` knows; those
            of text with `options`, completions to rank, where they have such a column.
        limit: evaluate this many items, drawn with `seed`; None is all.
        seed: seed of that draw.
        max_new_tokens: longest answer, in tokens.
        template: one of `templates.TEMPLATES`, or None where the rows have prompts and completions already.
        tokenizer: needed by messages and chat templates.
        row_options: what the training run said about its rows.
    """
    options = row_options or RowOptions()
    drawn, special_tokens = templated_rows(name, rows, template, limit, seed, Rendering(options, tokenizer))
    items = [
        Item(parts.prompt, parts.answer.strip(), choices_of(rows[number - 1], parts), parts.completion, row)
        for number, row, parts in drawn
    ]
    return Task(
        name,
        items,
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
    found, special_tokens = templated_rows(name, rows, template if whole else None, limit, seed, rendering)
    items = []
    for place, row, parts in found:
        with naming_row(name, place):
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
                with naming_row(name, 1):
                    make_row = from_columns(*columns, template_of(template) if template is not None else None)
                    rows = list(map(make_row, rows))
            given |= {"row_options": row_options}
            written = template if columns is None else None  # by the columns, already
            task = prompt_completion_task(Path(name).stem, rows, template=written, **drawn, **given)
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
