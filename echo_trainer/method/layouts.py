"""Which tokens an echo pass runs: whole rows, or suffixes in one or several passes (see `suffixes`). Host side.

Shapes: F = B*T positions of the batch, E positions that predict an answer token and that the echo reaches; in the echo
pass R rows of A tokens after P prefix tokens, n prefix tokens of all its rows, J positions that receive an echo.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from jaxtyping import Int
from torch import Tensor

from .indices import Indices
from .segments import Segments


class EchoForm(StrEnum):
    """
    How an echo pass is computed, the smallest first.

    SUFFIX runs what follows the first echo of each routed document; RECOMPUTED does so too and keeps next to nothing
    of it for backward, but computes it again then. ROWS runs the rows that hold a routed document, BATCH every row
    (where an input belongs to no row, or to several).
    """

    RECOMPUTED = "suffix, recomputed"
    SUFFIX = "suffix"
    ROWS = "full"
    BATCH = "full (whole batches)"

    @property
    def runs_suffixes(self) -> bool:
        """Whether only what follows the first echo is run."""
        return self in (EchoForm.RECOMPUTED, EchoForm.SUFFIX)


@dataclass(frozen=True)
class Pick(Indices):
    """
    What some rows own of an input.

    Attributes:
        index: int64 (n,), entries along `axis`.
        axis: of the input.
    """

    index: Int[Tensor, "n"]
    axis: int


@dataclass(frozen=True)
class PassLayout(Indices):
    """
    Which tokens the echo pass runs, where it adds the echo, and which of its outputs are used.

    Attributes:
        inject_position_J: int64 (J,), positions in the flattened (R, A) input of the pass that receive an echo.
        inject_segment_J: int64 (J,), routed segment (0 .. G-1) whose echo each of them receives.
        output_position_E: int64 (E,), positions in the flattened (R, A) output that predict an answer token.
    """

    inject_position_J: Int[Tensor, "J"]
    inject_segment_J: Int[Tensor, "J"]
    output_position_E: Int[Tensor, "E"]


@dataclass(frozen=True)
class FullLayout(PassLayout):
    """
    The echo pass runs whole rows of the batch again.

    Attributes:
        row_R: int64 (R,), the rows of the batch that are run; None for all of them as they are.
        picks: what these rows own of the inputs that are not text, by name.
    """

    row_R: Int[Tensor, "R"] | None
    picks: dict[str, Pick] = field(default_factory=dict)


@dataclass(frozen=True)
class SuffixPart(PassLayout):
    """
    One pass over some suffixes, on keys and values of the plain pass.

    Documents become rows: P prefix positions, right-aligned so that a prefix ends where its suffix begins, then A
    suffix positions, left-aligned. That is the layout of a left-padded prompt with a cache, which every attention
    kernel and mask of transformers understands, sliding windows included.

    Attributes:
        token_RA: int64 (R, A), position in F of each suffix token (padding repeats a valid one).
        position_RA: int64 (R, A), position id of each suffix token. At least one place of padding carries the largest
            position id of the batch: some rotary embeddings depend on it, and the plain pass has seen it.
        mask_RK: int64 (R, P + A), 1 for real prefix and suffix tokens.
        real_token: int64, where the flattened `token_RA` is not padding.
        prefix_n: int64 (n,), positions in F of the prefix tokens, row after row.
        place_n: int64 (n,), where each of them stands among the flattened (R, P + A) keys.
        n_prefix: P.
    """

    token_RA: Int[Tensor, "R A"]
    position_RA: Int[Tensor, "R A"]
    mask_RK: Int[Tensor, "R K"]
    real_token: Int[Tensor, "tokens"]
    prefix_n: Int[Tensor, "n"]
    place_n: Int[Tensor, "n"]
    n_prefix: int


@dataclass(frozen=True)
class SuffixLayout(Indices):
    """
    The echo pass runs only what follows the first echo of each routed document, in one pass or several.

    Attributes:
        parts: the passes; documents of like length share one (see `grouping`).
        order_E: int64 (E,), where the outputs of the parts, one after the other, hold each reached position; None
            where that is their order.
        n_idle: parts at the end that run for no other reason than that other processes run as many.
        recompute: whether what the parts compute is computed again in backward and not kept.
    """

    parts: tuple[SuffixPart, ...]
    order_E: Int[Tensor, "E"] | None = None
    n_idle: int = 0
    recompute: bool = False


Layout = FullLayout | SuffixLayout


def full_layout(
    segments: Segments,
    inject_F: Int[Tensor, "F"],
    reached: Int[Tensor, "E"],
    position_ids: Int[Tensor, "rows T"] | None = None,
    all_rows: bool = False,
    images: Sequence[int] = (),
) -> FullLayout:
    """
    The rows that hold a reached position, whole, the one with the largest position id (see `SuffixLayout`), and one
    with an image where others have some: a model may go another way without any.

    Args:
        segments: the answers of the batch.
        inject_F: routed segment whose echo is added at each position, -1 where none, (F,).
        reached: positions in F that the echo reaches and that predict an answer token, (E,).
        position_ids: as for `plan.make_plan`.
        all_rows: run every row.
        images: of each row; empty where there are none.
    """
    n_rows, length = segments.shape
    rows = reached // length
    if any(images) and not any(images[row] for row in rows.tolist()):
        rows = torch.cat([rows, torch.tensor([next(row for row, count in enumerate(images) if count)])])
    if position_ids is not None and position_ids.shape[0] == n_rows:
        rows = torch.cat([rows, position_ids.reshape(-1).argmax()[None] // length])
    row_R = torch.arange(n_rows) if all_rows else torch.unique(rows)
    new_row = torch.full((n_rows,), -1)
    new_row[row_R] = torch.arange(len(row_R))
    inject = inject_F.ge(0).nonzero().flatten()
    inject = inject[new_row[inject // length].ge(0)]
    return FullLayout(
        row_R=None if len(row_R) == n_rows else row_R,
        inject_position_J=new_row[inject // length] * length + inject % length,
        inject_segment_J=inject_F[inject],
        output_position_E=new_row[reached // length] * length + reached % length,
    )


def position_ids_F(segments: Segments, position_ids: Int[Tensor, "rows T"] | None) -> Int[Tensor, "F"]:
    """Position id of every position of the flattened batch, (F,)."""
    if position_ids is not None:
        return position_ids.expand(segments.shape).reshape(-1)
    return torch.arange(segments.shape[1]).repeat(segments.shape[0])
