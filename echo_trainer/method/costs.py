"""What an echo pass costs, computed on the host from its layout: operations, and bytes kept for backward.

Shapes: B rows of T tokens; a pass runs R rows of A tokens, each of which sees up to P + A keys, through l layers; n
prefix tokens of all rows; d hidden size.

    flops = l [ c W tokens + (2 c + 4) q pairs ]    tokens = sum R A, pairs = sum R A (P + A), c = 4, or 6 where a
                                                    checkpointed layer is computed again
    bytes = l s [ k tokens + v n ]                  k = d with checkpointing, else what a layer keeps of a token

with W weights in the linear maps of a layer, q width of all queries, v width of a key and a value, s bytes a number.
An adapter's own weights are left out, and that a causal kernel may skip half of the pairs.
"""

from dataclasses import dataclass, replace

from . import grouping
from .forms import Layout, Work
from .plan import EchoPlan
from .segments import Segments

FLOPS_PER_BYTE = 300
"""Operations an accelerator does while it moves one byte to or from its memory (bfloat16, 2020 and later)."""


@dataclass(frozen=True)
class ModelShape:
    """
    The sizes of a model that a pass costs by; means over its layers.

    Attributes:
        layers, first_target: number of layers, and the first that a pass over suffixes runs.
        hidden: d.
        weights: W, of the linear maps of a layer.
        activations: numbers that a layer keeps of one token for backward, without checkpointing.
        queries: q, width of all heads' queries.
        key_values: v, width of all heads' keys and values.
        itemsize: s, bytes.
        checkpointing: whether layers are computed again in backward.
        varlen: whether the attention kernel computes pairs of one document only, where a row holds several.
    """

    layers: int
    first_target: int
    hidden: int
    weights: float
    activations: float
    queries: int
    key_values: int
    itemsize: int
    checkpointing: bool
    varlen: bool = False


@dataclass(frozen=True)
class Cost:
    """
    Floating-point operations of a pass, forward and backward, and bytes that it keeps in between.

    Attributes:
        overhead: operations that could be done in the time that launching its kernels takes (`grouping.PASS`).
    """

    flops: float
    saved_bytes: float
    overhead: float

    @property
    def total(self) -> float:
        """In operations; a byte is written once and read once."""
        return self.flops + self.overhead + 2 * FLOPS_PER_BYTE * self.saved_bytes


def echo_cost(layout: Layout, segments: Segments, model: ModelShape) -> Cost:
    """
    What the echo pass of a batch costs.

    Args:
        layout: of the pass.
        segments: the answers of the batch.
        model: sizes of the model.
    """
    return _cost_of(layout.work(segments.shape), segments, model)


def whole_rows_cost(rows: int, segments: Segments, model: ModelShape) -> Cost:
    """What a pass over so many whole rows of a batch costs, those of mean length."""
    tokens = rows * segments.shape[1]
    return _cost_of(Work(tokens, tokens, tokens * segments.shape[1]), segments, model)


def whole_rows_cost_less(plan: EchoPlan, segments: Segments, model: ModelShape) -> bool:
    """
    Whether running whole rows costs less than the suffixes that a plan is laid out for.

    Suffixes are a part of their rows, so this is rare: documents that are answers almost from their first token on,
    whose lengths differ more than rows of packed documents do.
    """
    if plan.layout is None or plan.layout.work(segments.shape).whole_rows:
        return False
    length = segments.shape[1]
    rows = len((plan.predict_N[plan.reach_E] // length).unique()) or 1
    return whole_rows_cost(rows, segments, model).total < echo_cost(plan.layout, segments, model).total


def _cost_of(work: Work, segments: Segments, model: ModelShape) -> Cost:
    pairs: float = work.pairs
    if work.whole_rows and model.varlen and segments.n_documents > segments.shape[0]:
        of_the_batch = float((segments.end_D - segments.start_D).square().sum())
        pairs = of_the_batch * work.tokens / segments.n_positions
    layers = model.layers if work.whole_rows else model.layers - model.first_target
    if not work.recompute:
        return _cost(model, layers, work.tokens, pairs, work.kept, work.runs)
    again = _cost(replace(model, checkpointing=True), layers, work.tokens, pairs, 0, work.runs)
    # With checkpointing the keys and values of the prefixes are computed forward twice and backward once more.
    replays = 6 * layers * model.hidden * model.key_values * work.kept if model.checkpointing else 0
    return replace(again, flops=again.flops + replays)


def _cost(model: ModelShape, layers: int, tokens: int, pairs: float, kept: int, passes: int) -> Cost:
    c = 6 if model.checkpointing else 4
    of_a_token = model.hidden if model.checkpointing else model.activations
    return Cost(
        flops=layers * (c * model.weights * tokens + (2 * c + 4) * model.queries * pairs),
        saved_bytes=layers * model.itemsize * (of_a_token * tokens + model.key_values * kept),
        overhead=layers * c * model.weights * grouping.PASS * passes,
    )
