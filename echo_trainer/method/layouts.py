"""Which tokens an echo pass runs: whole rows, or suffixes in one or several passes (see `suffixes`). Host side.

Shapes: F = B*T positions of the batch, E positions that predict an answer token and that the echo reaches; in the echo
pass R rows of A tokens after P prefix tokens, n prefix tokens of all its rows, J positions that receive an echo.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from .forms import Reach, Work
from .indices import Indices
from .segments import Segments


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
    order_E: ClassVar[None] = None

    def outputs(self, shape: tuple[int, int]) -> list[tuple[tuple[int, int], Int[Tensor, "_"]]]:
        """See `Layout`."""
        return [((self._rows(shape), shape[1]), self.output_position_E)]

    def work(self, shape: tuple[int, int], mask: Tensor | None = None) -> Work:
        """See `Layout`."""
        rows, length = self._rows(shape), shape[1]
        real = rows * length if mask is None else int((mask if self.row_R is None else mask[self.row_R]).sum())
        return Work(rows * length, real, rows * length**2)

    def words(self) -> str:
        """See `Layout`."""
        return f"runs {'' if self.row_R is None else f'{len(self.row_R)} '}whole rows again"

    def _rows(self, shape: tuple[int, int]) -> int:
        return shape[0] if self.row_R is None else len(self.row_R)


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

    def outputs(self, shape: tuple[int, int]) -> list[tuple[tuple[int, int], Int[Tensor, "_"]]]:
        """See `Layout`."""
        return [((part.token_RA.shape[0], part.token_RA.shape[1]), part.output_position_E) for part in self.parts]

    def work(self, shape: tuple[int, int], mask: Tensor | None = None) -> Work:
        """See `Layout`."""
        parts = self.parts
        return Work(
            tokens=sum(part.token_RA.numel() for part in parts),
            real=sum(len(part.real_token) for part in parts),
            pairs=sum(part.token_RA.numel() * part.mask_RK.shape[1] for part in parts),
            kept=sum(len(part.prefix_n) for part in parts),
            runs=len(parts),
            whole_rows=False,
            recompute=self.recompute,
        )

    def words(self) -> str:
        """See `Layout`."""
        work = self.work((0, 0))
        keys = "computed again in backward" if self.recompute else "kept for backward"
        return (
            f"runs {work.tokens} tokens ({work.real} without padding) in {work.runs} passes over suffixes, after "
            f"{work.kept} prompt tokens whose keys and values are {keys}"
        )


def full_layout(reach: Reach, all_rows: bool = False) -> FullLayout:
    """
    The rows that hold a reached position, whole, the one with the largest position id (see `SuffixLayout`), and one
    with an image where others have some: a model may go another way without any.

    Args:
        reach: what to run for.
        all_rows: run every row.
    """
    if not len(reach.reached):
        reach = one_token(reach)
    n_rows, length = reach.segments.shape
    inject_F, reached, position_ids, images = reach.inject_F, reach.reached, reach.position_ids, reach.images
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
    whole = len(row_R) == n_rows
    return FullLayout(
        row_R=None if whole else row_R,
        picks={} if whole or reach.picks is None else reach.picks(row_R.tolist()),
        inject_position_J=new_row[inject // length] * length + inject % length,
        inject_segment_J=inject_F[inject],
        output_position_E=new_row[reached // length] * length + reached % length,
    )


def one_token(reach: Reach) -> Reach:
    """The same batch with an echo of the first segment at its first document's second token and nowhere else."""
    _, last = first_two(reach.segments)
    inject_F = torch.full((reach.segments.n_positions,), -1)
    inject_F[last] = 0
    return replace(reach, inject_F=inject_F, reached=torch.tensor([last]), images=(), picks=None)


def first_two(segments: Segments) -> tuple[int, int]:
    """First and second position of the first document; the same where it has only one."""
    first = int(segments.start_D[0]) if segments.n_documents else 0
    return first, min(first + 1, int(segments.end_D[0]) - 1 if segments.n_documents else 0)


def position_ids_F(segments: Segments, position_ids: Int[Tensor, "rows T"] | None) -> Int[Tensor, "F"]:
    """Position id of every position of the flattened batch, (F,)."""
    if position_ids is not None:
        return position_ids.expand(segments.shape).reshape(-1)
    return torch.arange(segments.shape[1]).repeat(segments.shape[0])
