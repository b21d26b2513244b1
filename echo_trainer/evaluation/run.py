"""Run an evaluation with its records in a folder: resumable, one file for each task and mode."""

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .._version import __version__
from ..files import write_json
from .evaluate import Record, Task, evaluate_task
from .model import Loaded
from .readers import Reader
from .records import RecordFile, items_digest
from .results import macro_average, task_result

OF_THE_ECHO, OF_ANOTHER_ECHO = "-echo", "-other-echo"
"""What names of files end with where the echo pass was evaluated, and where it was with the echoes of other items."""

# Names of the same data in lm-evaluation-harness. Its prompts differ, so its figures are not the same.
HARNESS_TASKS = {
    "boolq": "boolq",
    "piqa": "piqa",
    "social_i_qa": "social_iqa",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "ARC-Easy": "arc_easy",
    "ARC-Challenge": "arc_challenge",
    "openbookqa": "openbookqa",
    "gsm8k": "gsm8k",
}


def run_evaluation(
    loaded: Loaded,
    tasks: Sequence[Task],
    folder: Path,
    *,
    mode: str = "generate",
    batch_size: int = 32,
    num_beams: int = 1,
    settings: dict[str, Any] | None = None,
    restart: bool = False,
    advance: Callable[[Task, int], None] | None = None,
    reader: Reader | None = None,
    ending: str = "",
) -> dict[str, Any]:
    """
    Evaluate a model on tasks and keep every record.

    Args:
        loaded: the model.
        tasks: the tasks.
        folder: gets TASK.MODE.jsonl (records; read again when the evaluation continues) and results.MODE.json.
        mode: "generate", "rank" or "nll"; see `evaluate_task`.
        batch_size: items at a time. It may differ when an evaluation continues.
        num_beams: beams in mode "generate".
        settings: options worth naming when a continued evaluation differs, such as template and limit.
        restart: delete the records of the same tasks and mode first.
        advance: called with the task and a number of finished items, for a progress bar.
        reader: what reads and writes in place of the model as it is: the echo pass of a run. `loaded.identity` must
            name it.
        ending: what MODE in the names of files ends with.

    Returns:
        What results.MODE.json holds: the figure of every task, their average, the model, options, time and speed.

    Raises:
        ValueError: the folder holds records of another model, data or options, or two tasks have one name.
    """
    files: dict[str, RecordFile] = {}
    label = f"{mode}{ending}"
    for task in tasks:
        if task.name in files:
            raise ValueError(f"Two tasks are named {task.name!r}, and would share a file of records. Rename one file.")
        path = folder / f"{task.name}.{label}.jsonl"
        if restart:
            path.unlink(missing_ok=True)
        files[task.name] = RecordFile(
            path, _identity(loaded, task, mode, num_beams, settings or {}), [*(settings or {})]
        )
    results, clock = [], _Clock()
    for task in tasks:
        file = files[task.name]
        before = set(file.done)

        def step(n: int, task: Task = task) -> None:
            if advance is not None:
                advance(task, n)

        step(0)
        begin = time.perf_counter()
        records = evaluate_task(
            loaded.model, loaded.tokenizer, task, mode=mode, batch_size=batch_size, advance=step, done=file.done,
            save=file.save, num_beams=num_beams, reader=reader,
        )  # fmt: skip
        clock.add(loaded.tokenizer, task, records, before, time.perf_counter() - begin)
        results.append(task_result(task, records, mode))
    summary = {
        "model": loaded.identity,
        "mode": mode,
        "options": {"batch_size": batch_size, "num_beams": num_beams, **(settings or {})},
        "results": results,
        "average": macro_average(results),
        "this_session": clock.summary(),
        "device": str(loaded.model.device),
        "versions": {
            "echo_trainer": __version__,
            **{name: version(name) for name in ("torch", "transformers", "peft")},
        },
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(folder / f"results.{label}.json", summary, indent=2, allow_nan=False)
    return summary


def harness_command(loaded: Loaded, tasks: Sequence[str], dtype: str) -> str | None:
    """The lm-evaluation-harness command for the same model and data; None where it knows none of the tasks."""
    known = [HARNESS_TASKS[name] for name in tasks if name in HARNESS_TASKS]
    if not known:
        return None
    model = f"pretrained={loaded.base}" + (f",peft={loaded.adapter}" if loaded.adapter else "") + f",dtype={dtype}"
    return f"lm_eval --model hf --model_args {model} --tasks {','.join(known)} --batch_size auto"


def _identity(loaded: Loaded, task: Task, mode: str, num_beams: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Everything that decides a record."""
    generated = {"num_beams": num_beams, "max_new_tokens": task.max_new_tokens} if mode == "generate" else {}
    return {
        **loaded.identity, **settings, "task": task.name, "items": len(task.items), "digest": items_digest(task),
        "mode": mode, **generated,
    }  # fmt: skip


class _Clock:
    """Time and prompt tokens of the items that this session evaluated."""

    def __init__(self) -> None:
        self.tasks: dict[str, dict[str, Any]] = {}

    def add(self, tokenizer: Any, task: Task, records: Sequence[Record], before: set[int], seconds: float) -> None:
        new = [task.items[record.index].prompt for record in records if record.index not in before]
        if new:
            tokens = sum(map(len, tokenizer(new, add_special_tokens=task.special_tokens)["input_ids"]))
            self.tasks[task.name] = {"items": len(new), "prompt_tokens": tokens, "seconds": round(seconds, 2)}

    def summary(self) -> dict[str, Any]:
        items, tokens, seconds = (
            sum(task[key] for task in self.tasks.values()) for key in ("items", "prompt_tokens", "seconds")
        )
        speed = round(tokens / seconds, 1) if seconds else None
        return {
            "items": items, "prompt_tokens": tokens, "seconds": round(seconds, 2), "prompt_tokens_per_second": speed,
            "tasks": self.tasks,
        }  # fmt: skip
