"""Counted floating-point operations of a training run.

The matrix operations of a step are a linear function of a few sizes of its batch. Those sizes are kept for every step
(`step_sizes`), the coefficients are found by counting small random batches with torch's counter
(`count_coefficients`), and their product is the count of the run: exact, without a counter in the way of the training.

Not counted are operations that are no matrix products. The head of plain LoRA is counted on the positions whose loss
is taken, as TRL computes it on a GPU; on a CPU TRL projects every position, which would flatter the echo.
"""

from typing import Any

import numpy as np
import torch

from ..compat.flops import FastFlopCounter
from ..method.forms import EchoForm
from ..method.losses import EchoLoss
from ..method.plan import EchoPlan, make_plan
from ..method.segments import find_segments
from ..passes.setup import EchoSetup
from ..passes.step import echo_step

SIZES = (
    "passes", "tokens", "attention", "scored",
    "echo_passes", "echo_tokens", "echo_attention", "echo_scored", "segments", "echo_prefix",
)  # fmt: skip
_BATCHES, _ECHO_BATCHES = 6, 16


def plain_sizes(rows: int, length: int, scored: int) -> np.ndarray:
    """Sizes of a micro-batch without an echo pass: `scored` positions of (rows, length) tokens have a loss."""
    sizes = np.zeros(len(SIZES))
    sizes[:4] = 1, rows * length, rows * length**2, scored
    return sizes


def step_sizes(rows: int, length: int, plan: EchoPlan) -> np.ndarray:
    """Sizes of a micro-batch that determine its FLOPs, in the order of `SIZES`."""
    sizes = plain_sizes(rows, length, len(plan.labels_N))
    layout = plan.layout
    if layout is None:
        return sizes
    work = layout.work((rows, length))
    kept = work.kept  # what is computed again of the prefixes
    sizes[4:] = 1, work.tokens, work.pairs, len(plan.reach_E), len(plan.boundary_G), kept
    return sizes


def count_coefficients(setup: EchoSetup, terms: EchoLoss, form: EchoForm, positions: str, echo: bool) -> np.ndarray:
    """
    FLOPs per unit of each of `SIZES`, for forward and backward, by counting small random batches.

    Args:
        setup: the model and its echo parts (`plain_setup` where the echo is off).
        terms, form, positions: as in training.
        echo: whether to count echo passes.

    Returns:
        Coefficients in the order of `SIZES`; those of an echo pass are 0 without one.
    """
    generator = np.random.default_rng(0)
    device = next(setup.model.parameters()).device
    rows, counts = [], []
    with torch.random.fork_rng():
        for number in range(_ECHO_BATCHES if echo else _BATCHES):
            examples = _random_examples(generator, setup.model.config.get_text_config().vocab_size)
            inputs, plan = _batch(examples, generator, echo and number % 4 > 0, form, positions)
            plan = plan.to(device)
            rows_of_batch, length = inputs["input_ids"].shape
            sizes = step_sizes(rows_of_batch, length, plan)
            with FastFlopCounter() as counter:
                output = echo_step(setup, terms, {k: v.to(device) for k, v in inputs.items()}, plan)
                output["objective"].backward()
            rows.append(sizes)
            counts.append(counter.total)
    for parameter in setup.model.parameters():
        parameter.grad = None
    for parameter in setup.networks.parameters():
        parameter.grad = None
    matrix = np.array(rows)
    scale = matrix.max(axis=0).clip(min=1)
    solution, *_ = np.linalg.lstsq(matrix / scale, np.array(counts, float), rcond=1e-12)
    return np.round(solution / scale)  # whole numbers up to float noise


def _random_examples(generator: np.random.Generator, vocabulary: int) -> list[dict[str, Any]]:
    """A few prompts and answers of random lengths, some with two turns."""
    examples = []
    for _ in range(generator.integers(2, 5)):
        ids: list[int] = []
        labels: list[int] = []
        for _ in range(generator.integers(1, 3)):
            prompt, answer = generator.integers(3, 14), generator.integers(2, 9)
            tokens = generator.integers(0, vocabulary, prompt + answer).tolist()
            ids += tokens
            labels += [-100] * prompt + tokens[prompt:]
        examples.append({"input_ids": ids, "labels": labels})
    return examples


def _batch(
    examples: list[dict[str, Any]], generator: np.random.Generator, routed: bool, form: EchoForm, positions: str
) -> tuple[dict[str, torch.Tensor], EchoPlan]:
    length = max(len(example["input_ids"]) for example in examples)

    def padded(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([example[name] + [fill] * (length - len(example[name])) for example in examples])

    batch = {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100)}
    batch["attention_mask"] = torch.tensor(
        [[1] * len(e["input_ids"]) + [0] * (length - len(e["input_ids"])) for e in examples]
    )
    segments = find_segments(batch, examples)
    routes = [routed and bool(generator.integers(2)) for _ in range(segments.n_documents)]
    if routed:
        routes[0] = True
    plan = make_plan(segments, routes, positions=positions, form=form)
    batch.pop("labels")
    return batch, plan
