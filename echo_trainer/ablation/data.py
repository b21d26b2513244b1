"""Training, held-out and test items of an ablation, from local files."""

import hashlib
import inspect
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.evaluate import Item, Task
from ..evaluation.tasks import commonsense_task, prompt_completion_task, read_rows
from ..options import marker
from ..recipe.arguments import arguments_of
from ..recipe.training import load_tokenizer
from ..rendering.forms import COLUMNS, Form, RowOptions, form_of
from ..rendering.prompts import parts_of
from ..rendering.rendering import Rendering
from ..templates import TEMPLATES
from .recipe import AblationRecipe

_SPLIT_SEED = 0
ACCURACY_MODES = ("generate", "rank")


def load_examples(recipe: AblationRecipe) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """
    Training and held-out examples with a prompt and a completion; the same for every run and seed.

    With `train_draw: seed` the first are the pool that each seed draws its own from (`drawn`).

    Raises:
        ValueError: nothing would be left to train on, or an example has no prompt and completion.
    """
    template = TEMPLATES.get(recipe.training.get("dataset_template") or "", dict)
    options = row_options(recipe)
    rows = [template(row) for path in recipe.train for row in read_rows(Path(path))]
    for row in rows:
        form = form_of(row, options)
        if form not in (Form.PAIR, Form.CONVERSATION) and not (form is Form.TEXT and options.answer_marker):
            raise ValueError(
                f"Training examples need `prompt` and `completion`, `messages`, or `text` with an answer_marker; "
                f"found {sorted(row)}. Set `dataset_template: alpaca` for files with instruction and output."
            )
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(rows))
    held_out = [rows[i] for i in order[: recipe.validation_items]]
    limit = recipe.train_limit if recipe.train_draw == "once" else None
    train = [rows[i] for i in order[recipe.validation_items :]][:limit]
    if not train:
        raise ValueError(
            f"`validation_items` is {recipe.validation_items}, and the training files have {len(rows)} examples: none "
            f"is left to train on. Hold out fewer."
        )
    keep = (*COLUMNS, options.dataset_text_field)

    def kept(part: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: row[k] for k in keep if k in row} for row in part]

    return kept(train), kept(held_out)


def drawn(recipe: AblationRecipe, pool: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """The training examples of a seed, out of those of `load_examples`."""
    if recipe.train_draw == "once":
        return pool
    return [pool[i] for i in order_of(pool, seed)[: recipe.train_limit]]


def order_of(pool: list[dict[str, Any]], seed: int) -> list[int]:
    """The order in which a seed draws examples out of those of `load_examples`."""
    return np.random.default_rng([_SPLIT_SEED, seed]).permutation(len(pool)).tolist()


def row_options(recipe: AblationRecipe) -> RowOptions:
    """What the recipe says about its rows."""
    return RowOptions.of(
        recipe.training | {"answer_marker": marker("answer_marker", recipe.training.get("answer_marker"))}
    )


def tokenizer_of(recipe: AblationRecipe) -> Any:
    """The tokenizer of the runs."""
    _, config, adapter, _ = arguments_of({"output_dir": "unused", **recipe.training})
    return load_tokenizer(adapter, config)


def load_tests(recipe: AblationRecipe) -> list[Task]:
    """
    The test sets.

    Raises:
        ValueError: two have the same name, or one has unknown options.
    """
    known = [name for name in inspect.signature(make_task).parameters if name != "recipe"]
    for test in recipe.tests:
        unknown = sorted(set(test) - set(known)) if isinstance(test, dict) else [test]
        if unknown or not {"name", "file"} <= test.keys():
            raise ValueError(f"The test set {test!r} cannot be read. It needs `name` and `file`; known are {known}.")
    tasks = [make_task(recipe, **test) for test in recipe.tests]
    names = [task.name for task in tasks]
    if len(set(names)) != len(names):
        raise ValueError(f"Two test sets have the same name: {names}. Give each a `name` of its own.")
    return tasks


def make_task(
    recipe: AblationRecipe,
    *,
    name: str,
    file: str,
    kind: str = "prompt-completion",
    limit: int | None = None,
    max_new_tokens: int | None = None,
    mode: str = "generate",
) -> Task:
    """
    One test set.

    Args:
        recipe: gives the template, and says what answers are.
        name: name in results; for kind "commonsense" one of LLM-Adapters' names, such as "boolq".
        file: JSON list or JSON lines.
        kind: "prompt-completion" (exact match) or "commonsense" (LLM-Adapters: the named option counts).
        limit: use so many items, drawn once for all runs; None: all.
        max_new_tokens: longest generated answer.
        mode: what accuracy counts: "generate" (answers that are written) or "rank" (the most likely of the row's
            `options`).
    """
    if mode not in ACCURACY_MODES:
        raise ValueError(f"The test set {name!r} has mode {mode!r}. It can be {', '.join(map(repr, ACCURACY_MODES))}.")
    task = _task(recipe, name, file, kind, limit, max_new_tokens)
    if mode == "rank" and not all(item.options for item in task.items):
        raise ValueError(
            f"The test set {name!r} has mode 'rank', and rows without `options`: a list of completions as text, with "
            f"the `completion` of the row among them, once. Add the column, or leave the mode out."
        )
    return task


def accuracy_modes(recipe: AblationRecipe) -> dict[str, str]:
    """How each test set is answered, by its name."""
    return {test["name"]: test.get("mode", "generate") for test in recipe.tests}


def _task(
    recipe: AblationRecipe, name: str, file: str, kind: str, limit: int | None, max_new_tokens: int | None
) -> Task:
    rows = read_rows(Path(file))
    options: dict[str, Any] = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    template = recipe.training.get("dataset_template") or "alpaca"
    chat = has_messages(rows) if kind == "prompt-completion" else template == "chat"
    options |= {"tokenizer": tokenizer_of(recipe) if chat else None}
    if kind == "prompt-completion":
        return prompt_completion_task(name, rows, limit=limit, row_options=row_options(recipe), **options)
    if kind == "commonsense":
        return commonsense_task(name, rows, template=template, limit=limit, **options)
    raise ValueError(f"The test set {name!r} has kind {kind!r}. It can be 'prompt-completion' or 'commonsense'.")


def held_out_task(recipe: AblationRecipe, rows: list[dict[str, Any]]) -> Task:
    """The held-out training examples, to be scored."""
    options = row_options(recipe)
    rendering = Rendering(options, tokenizer_of(recipe) if has_messages(rows) else None)
    parts = [(parts_of(row, rendering), row) for row in rows]
    items = [Item(part.prompt, part.completion, row=row) for part, row in parts]
    special_tokens = all(part.special_tokens for part, _ in parts)
    return Task("held-out", items, str.strip, 1, special_tokens=special_tokens, row_options=options)


def has_messages(rows: list[dict[str, Any]]) -> bool:
    """Whether some rows are written by a chat template."""
    return any(
        not isinstance(row.get("prompt", ""), str) or "messages" in row or "conversations" in row for row in rows
    )


def fingerprints(recipe: AblationRecipe) -> dict[str, str]:
    """Short hashes of the base's weights (of its name, where it is no local folder) and of every data file."""
    model = Path(recipe.training["model_name_or_path"])
    if model.is_dir():
        files = sorted(p for p in model.iterdir() if p.suffix in (".safetensors", ".json", ".bin", ".gguf"))
        found = {"base": _hash(files)}
    else:
        found = {"base": str(model)}
    found["train"] = _hash([Path(path) for path in recipe.train])
    return found | {f"test {test.get('name')}": _hash([Path(test["file"])]) for test in recipe.tests}


def _hash(paths: list[Path]) -> str:
    total = hashlib.sha256()
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"The file {path} does not exist.")
        with path.open("rb") as file:
            while block := file.read(2**22):
                total.update(block)
    return total.hexdigest()[:16]
