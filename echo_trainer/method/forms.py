"""What a way to compute the echo pass consists of; the ways there are stand in the table of `passes.echo`. Host side.

Shapes: B rows of T tokens, F = B*T positions of the batch, D documents, E positions that predict an answer token and
that the echo reaches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Int
from torch import Tensor

from .segments import Segments

Picks = Callable[[Sequence[int]], dict[str, Any]]
"""What some rows own of the inputs that are not text: their numbers -> by input, a `layouts.Pick`."""


@dataclass(frozen=True)
class Reach:
    """
    What an echo pass has to run for.

    Attributes:
        segments: the answers of the batch.
        inject_F: routed segment whose echo is added at each position, -1 where none, (F,).
        first_D: first position that receives an echo in each document, (D,).
        reached: positions in F that the echo reaches and that predict an answer token, (E,). Where there is none, the
            smallest pass there is runs, for the sake of other processes: one output, one echo.
        position_ids, images, picks: as for `plan.make_plan`.
        n_parts: number of passes of a pass over suffixes; None for the cheapest.
    """

    segments: Segments
    inject_F: Int[Tensor, "F"]
    first_D: Int[Tensor, "D"]
    reached: Int[Tensor, "E"]
    position_ids: Int[Tensor, "rows T"] | None = None
    images: Sequence[int] = ()
    picks: Picks | None = None
    n_parts: int | None = None


@dataclass(frozen=True)
class Work:
    """
    What an echo pass runs: its cost follows from it (`costs`), and what is counted.

    Attributes:
        tokens, real: of all its rows, with padding and without.
        pairs: of a query and a key.
        kept: prefix tokens whose keys and values it reads.
        runs: of the layers.
        whole_rows: from the embedding on; else from the first target layer on.
        recompute: whether what it computes is computed again in backward.
    """

    tokens: int
    real: int
    pairs: int
    kept: int = 0
    runs: int = 1
    whole_rows: bool = True
    recompute: bool = False


@runtime_checkable
class Layout(Protocol):
    """
    Which tokens an echo pass runs; an `Indices`, so that it travels to the device with the plan.

    Attributes:
        order_E: int64 (E,), where the outputs of its runs, one after the other, hold each reached position; None where
            that is their order.
    """

    @property
    def order_E(self) -> Int[Tensor, "E"] | None:
        """See above."""
        ...

    def outputs(self, shape: tuple[int, int]) -> list[tuple[tuple[int, int], Int[Tensor, "_"]]]:
        """Of each run of the layers its (rows, width), and the positions in it that are put out; `shape` is (B, T)."""
        ...

    def work(self, shape: tuple[int, int], mask: Tensor | None = None) -> Work:
        """What it runs; `shape` is (B, T), `mask` (B, T) tells tokens from padding."""
        ...

    def words(self) -> str:
        """What it runs, to stand behind "the echo pass, which"."""
        ...


@dataclass(frozen=True)
class EchoForm:
    """
    A way to compute an echo pass; the table of them is `passes.echo.FORMS`.

    Attributes:
        name: in the log, in records and on the card.
        option: the value of `echo_pass` that asks for it; several forms may share one.
        says: what it runs, for the help of that option.
        lay_out: host side: which tokens it runs.
        run: device side, see `passes.echo.EchoPass`.
        lighter: the option that makes it smaller, for who has run out of memory; None where there is none.
        instead: what the trainer says it does where a cheaper form is not exact, up to "since the cheaper one".
        automatic: whether `echo_pass="auto"` tries it.
        runs_suffixes: runs what follows the first echo alone, on keys and values of the plain pass (`SuffixLayout`).
        recomputes: computes again in backward what it would keep; tried where `echo_memory` says so.
        picks_rows: runs rows without the others, each with what it owns of inputs that are not text (`Reach.picks`).
        repeats_plain: runs what the plain pass runs, so a longer batch needs no proof of its own.
    """

    name: str
    option: str
    says: str = field(compare=False)
    lay_out: Callable[[Reach], Any] = field(compare=False, repr=False)
    run: Callable[..., Any] = field(compare=False, repr=False)
    lighter: str | None = field(default=None, compare=False, repr=False)
    instead: str = field(default="takes another way from here on, since the cheaper one", compare=False, repr=False)
    automatic: bool = True
    runs_suffixes: bool = False
    recomputes: bool = False
    picks_rows: bool = False
    repeats_plain: bool = False

    def __str__(self) -> str:
        return self.name
