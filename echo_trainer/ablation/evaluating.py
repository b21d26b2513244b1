"""What a finished run of an ablation says about the test items: its plain path, and its echo pass where it has one."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ..evaluation.evaluate import Record, Task, accuracy, evaluate_task
from ..evaluation.readers import Reader
from .data import accuracy_modes
from .trainer import AblationTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .run_one import Workbench

Report = Callable[[str, int, int], None]
"""Called with what is done, how much of it is, and how much there is."""


def evaluate_run(
    bench: "Workbench", trainer: AblationTrainer, report: Report
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Accuracy and NLL of every task, and what was found for every item; of the echo pass as well, `echo_...`."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    tokenizer = cast("PreTrainedTokenizerBase", trainer.processing_class)
    size = bench.recipe.evaluation_batch_size
    echo = trainer.teacher()
    passes = 4 if echo is not None else 2
    total, done = sum(passes * len(task.items) for task in bench.tests) + len(bench.held_out.items), 0

    def score(task: Task, mode: str, reader: Reader | None = None) -> list[Record]:
        nonlocal done
        records = evaluate_task(model, tokenizer, task, mode=mode, batch_size=size, reader=reader)
        done += len(records)
        report("evaluating", done, total)
        return records

    held_out = score(bench.held_out, "nll")
    summary: dict[str, Any] = {bench.held_out.name: _means(held_out)}
    items: dict[str, Any] = {}
    modes = accuracy_modes(bench.recipe)
    for task in bench.tests:
        nll, answers = score(task, "nll"), score(task, modes[task.name])
        summary[task.name] = {**_means(nll), "accuracy": accuracy(answers)}
        items[task.name] = {
            "nll": _rounded(nll),
            "correct": [int(record.correct) for record in answers],
            "prediction": [record.prediction for record in answers],
        }
        if echo is not None:
            nll, answers = score(task, "nll", echo), score(task, modes[task.name], echo)
            summary[task.name] |= {"echo_nll": _means(nll)["nll"], "echo_accuracy": accuracy(answers)}
            items[task.name] |= {"echo_nll": _rounded(nll), "echo_correct": [int(r.correct) for r in answers]}
    return summary, items


def _means(records: list[Record]) -> dict[str, Any]:
    return {"n": len(records), "nll": float(np.mean([cast("float", record.nll) for record in records]))}


def _rounded(records: list[Record]) -> list[float]:
    return [round(cast("float", record.nll), 6) for record in records]
