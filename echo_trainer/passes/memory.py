"""Out of memory: say what was running and which options make it smaller."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from ..method.layouts import FullLayout, SuffixLayout

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
        if isinstance(plan.layout, FullLayout):
            advice.append("echo_pass='auto' with attention 'sdpa', which runs answers only")
        elif isinstance(plan.layout, SuffixLayout) and not plan.layout.recompute:
            advice.append("echo_memory='recompute', which keeps next to nothing of the echo pass for backward")
    choices = "\n".join(f"  - {line}" for line in advice)
    return (
        f"\nOut of memory during the {running} of a step: {rows} rows of {length} tokens, {len(plan.labels_N)} of "
        f"them to predict, {plan.n_routed} of {plan.n_samples} samples in the echo pass{_layout(plan)}. What makes it "
        f"smaller:\n{choices}"
    )


def _layout(plan: Any) -> str:
    """What the echo pass runs, in words."""
    layout = plan.layout
    if isinstance(layout, FullLayout):
        rows = "whole rows" if layout.row_R is None else f"{len(layout.row_R)} whole rows"
        return f", which runs {rows} again"
    if not isinstance(layout, SuffixLayout):
        return ""
    run, real, kept = (
        sum(sizes)
        for sizes in zip(
            *((p.token_RA.numel(), len(p.real_token), len(p.prefix_n)) for p in layout.parts), strict=True
        )
    )
    keys = "computed again in backward" if layout.recompute else "kept for backward"
    return (
        f", which runs {run} tokens ({real} without padding) in {len(layout.parts)} passes over suffixes, after "
        f"{kept} prompt tokens whose keys and values are {keys}"
    )
