"""What an engine does with an adapter, and the form of a rule that says so; the rules themselves are in `rules`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from .base import Base
from .engines import COLUMNS
from .folder import Adapter


class Verdict(StrEnum):
    """What an engine does with an adapter, from good to worst for a release gate."""

    SERVES = "serves"
    UNKNOWN = "unknown"
    SILENTLY_WRONG = "silently-wrong"
    REFUSES = "refuses"


_SIGNS = {"✓": Verdict.SERVES, "?": Verdict.UNKNOWN, "∅": Verdict.SILENTLY_WRONG, "✗": Verdict.REFUSES}


@dataclass(frozen=True)
class Rule:
    """One line of the table.

    Attributes:
        name: a short name, stable, for scripts.
        signs: what the engines do, in the order of `engines.COLUMNS`: ✓ served, ✗ refused, ∅ served wrong without a
            word, ? not known, as where there is no sign.
        find: returns what breaks the rule; None for the rules that reading the folder itself applies.
        says: what happens, in a sentence.
        fix: what to do about it.
        broken: PEFT itself refuses the adapter, loads a part of it, or computes something else than was trained, so
            that no other form can be made of it.

    """

    name: str
    signs: str
    find: Callable[[Adapter, Base | None], list[str]] | None
    says: str
    fix: str
    broken: bool = False

    def verdict(self, engine: str) -> Verdict:
        """What ``engine`` does with an adapter that breaks this rule."""
        signs = dict(zip(COLUMNS, self.signs.split(), strict=False))
        return _SIGNS[signs.get(engine, "?")]

    def broken_by(self, adapter: Adapter, base: Base | None) -> list[str]:
        """What of an adapter that could be read breaks this rule."""
        return self.find(adapter, base) if self.find is not None else []


@dataclass(frozen=True)
class Finding:
    """A rule that the adapter breaks, and the settings or tensors that break it."""

    rule: Rule
    where: list[str]
