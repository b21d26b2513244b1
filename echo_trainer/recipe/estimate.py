"""What a run will take, estimated from its first rows: rows that are left, optimizer steps, operations and bytes."""

import math
from typing import Any

from accelerate import PartialState

from ..config import EchoSFTConfig, kept_by_truncation
from ..method.costs import Cost, echo_cost, whole_rows_cost
from ..method.segments import IGNORE_INDEX
from ..passes.echo import forms_for
from ..passes.setup import EchoSetup
from ..passes.shape import model_shape
from ..run.collate import EchoCollator
from ..run.memory_choice import activations_dtype, computes_again


def cut(examples: list[dict[str, list[int]]], config: EchoSFTConfig) -> tuple[list[dict[str, list[int]]], float]:
    """Examples cut to `max_length` as TRL cuts them, those without an answer left out, and the share of these."""
    part = kept_by_truncation(config)
    cut = [{name: values[part] for name, values in example.items()} for example in examples]
    kept = [example for example in cut if any(label != IGNORE_INDEX for label in example["labels"])]
    if not kept:
        raise ValueError(
            f"None of the first {len(examples)} rows has an answer left after truncation to "
            f"max_length={config.max_length}. Raise `max_length`."
        )
    return kept, 1 - len(kept) / len(examples)


def steps_of(rows: int | None, lost: float, tokens: float, config: EchoSFTConfig) -> tuple[int, int, int]:
    """Optimizer steps, micro-batches of each, and processes."""
    world, per_step = PartialState().num_processes, config.gradient_accumulation_steps
    if config.max_steps > 0:
        return config.max_steps, per_step, world
    if rows is None:
        raise ValueError("The data is a stream, of which nobody knows the length: give `max_steps`.")
    count = rows * (1 - lost)
    if config.packing and config.max_length:
        count = count * tokens / config.max_length
    whole = math.floor if config.dataloader_drop_last else math.ceil
    batches = max(1, whole(round(count, 6) / (config.per_device_train_batch_size * world)))
    return math.ceil(config.num_train_epochs * math.ceil(batches / per_step)), per_step, world


def costs_of(
    setup: EchoSetup, config: EchoSFTConfig, collator: EchoCollator, examples: list[dict[str, Any]]
) -> dict[str, Cost]:
    """Mean operations and largest bytes of the micro-batches that the examples make, by pass."""
    shape = model_shape(setup, bool(config.gradient_checkpointing), activations_dtype(config))
    size = config.per_device_train_batch_size
    if config.packing and config.max_length:
        mean = sum(len(example["input_ids"]) for example in examples) / len(examples)
        size = max(1, round(size * config.max_length / mean))
    tokens = config.per_device_train_batch_size * (config.max_length or 1024)
    again = config.echo_enabled and computes_again(config.echo_memory, setup, shape, tokens)
    tried = forms_for(config.echo_pass, again) if config.echo_enabled else ()
    forms = [form for place, form in enumerate(tried) if form.option not in {other.option for other in tried[:place]}]
    found: dict[str, list[Cost]] = {}
    for first in range(0, max(1, len(examples) - size + 1), size):
        draft = collator.draft_with_all(examples[first : first + size])
        segments = draft.segments
        found.setdefault("plain", []).append(whole_rows_cost(segments.shape[0], segments, shape))
        for form in forms:
            layout = draft.plan(form).layout
            if layout is not None:
                found.setdefault(form.option, []).append(echo_cost(layout, segments, shape))
    return {name: _mean(costs) for name, costs in found.items()}


def _mean(costs: list[Cost]) -> Cost:
    n = len(costs)
    return Cost(
        flops=sum(cost.flops for cost in costs) / n,
        saved_bytes=max(cost.saved_bytes for cost in costs),
        overhead=sum(cost.overhead for cost in costs) / n,
    )
