"""
Evaluation: the accuracy of a model or an adapter, the same for every batch size.

    a task: rows, prompts, what counts as right     [tasks, rows, data, answers]
    batches of prompts, left-padded                 [evaluate, generation, scoring]
    results by item, resumable                      [run, records, results]
    the same figures as `evaluate.Metric`s          [metrics]
    base and adapter from a folder or the Hub       [model]
"""

from .evaluate import Item, Record, Task, accuracy, evaluate_task
from .tasks import load_tasks

__all__ = ["Item", "Record", "Task", "accuracy", "evaluate_task", "load_tasks"]
