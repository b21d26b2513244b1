"""Out of memory: say what was running and which options make it smaller."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

_running: ContextVar[str] = ContextVar("running", default="plain pass")
_SIGNS = ("out of memory", "can't allocate memory", "not enough memory")


def now_running(part: str) -> None:
    """Note which part of a step is at work: "plain pass", "echo pass", "loss" or "backward pass"."""
    _running.set(part)


@contextmanager
def explain_out_of_memory(inputs: dict[str, Any], plan: Any, running: str = "plain pass") -> Iterator[None]:
    """
    Add a note to an out-of-memory error raised inside; its type and text stay, since accelerate looks for them.

    Args:
        inputs: the batch.
        plan: its `EchoPlan`.
        running: what begins inside.
    """
    now_running(running)
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            error.add_note(_note(_running.get(), inputs, plan))
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the host has no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in str(error) for sign in _SIGNS)


def _note(running: str, inputs: dict[str, Any], plan: Any) -> str:
    rows, length = inputs["input_ids"].shape
    advice = [
        "per_device_train_batch_size with a higher gradient_accumulation_steps (the same training)",
        "gradient_checkpointing=True",
        "max_length, if your samples are shorter than what it allows",
    ]
    if running == "echo pass" or plan.layout is not None:
        advice.append("echo_p_start and echo_p_end (fewer samples in the echo pass)")
        if plan.layout is not None and plan.form.lighter is not None:
            advice.append(plan.form.lighter)
    choices = "\n".join(f"  - {line}" for line in advice)
    what = "" if plan.layout is None else f", which {plan.layout.words()}"
    return (
        f"\nOut of memory during the {running} of a step: {rows} rows of {length} tokens, {len(plan.labels_N)} of "
        f"them to predict, {plan.n_routed} of {plan.n_samples} samples in the echo pass{what}. What makes it "
        f"smaller:\n{choices}"
    )
