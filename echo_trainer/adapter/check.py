"""Will this adapter be served as it was trained? A verdict for each engine, with the rule, the tensor and the fix."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base import Base, read_base
from .engines import ENGINES, titles
from .folder import Adapter, AdapterError
from .read import read_adapter
from .rules import MERGE_ONLY, PORTABLE, UNREADABLE, Verdict, apply_rules
from .verdicts import Finding

if TYPE_CHECKING:
    from rich.console import Console

_SEVERITY = list(Verdict)
_STYLE = {"serves": "green", "unknown": "yellow", "silently-wrong": "bold red", "refuses": "red"}
_SHOWN = 3


@dataclass
class Report:
    """The outcome of `check_adapter`.

    Attributes:
        verdicts: engine -> what it will do.
        findings: the rules that were broken, whichever engine minds them.
        notes: what to know although nothing is wrong, for example the flag that vLLM needs.
        files: the adapter that was looked at; None where its folder cannot be read.

    """

    adapter: str
    base: str | None
    verdicts: dict[str, Verdict]
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: Adapter | None = None

    @property
    def ok(self) -> bool:
        """Whether every engine that was asked for serves the adapter as it was trained."""
        return all(verdict is Verdict.SERVES for verdict in self.verdicts.values())

    @property
    def exit_status(self) -> int:
        """0: all serve it. 1: one refuses it or serves it wrong. 3: neither, but for one of them it is not known."""
        worst = max(self.verdicts.values(), key=_SEVERITY.index)
        return {Verdict.SERVES: 0, Verdict.UNKNOWN: 3}.get(worst, 1)

    def for_engine(self, engine: str) -> list[Finding]:
        """The findings that matter to one engine."""
        return [found for found in self.findings if found.rule.verdict(engine) is not Verdict.SERVES]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        engines = {
            engine: {"verdict": str(verdict), "rules": [found.rule.name for found in self.for_engine(engine)]}
            for engine, verdict in self.verdicts.items()
        }
        findings = [
            {"rule": found.rule.name, "says": found.rule.says, "where": found.where, "fix": self._fix(found)}
            for found in self.findings
        ]
        head = {"adapter": self.adapter, "base": self.base, "ok": self.ok}
        return head | {"engines": engines, "findings": findings, "notes": self.notes}

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def print(self, console: Console | None = None) -> None:
        """Print a table of the verdicts, then what was found and what to do."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console = console or Console()
        table = Table(title=f"{self.adapter} on {self.base or 'an unknown base'}", title_justify="left")
        for column in ("engine", "verdict", "because of"):
            table.add_column(column)
        for engine, verdict in self.verdicts.items():
            rules = ", ".join(found.rule.name for found in self.for_engine(engine))
            table.add_row(engine, Text(verdict, style=_STYLE[verdict]), rules)
        console.print(table)
        for found in self.findings:
            more = [f"... and {len(found.where) - _SHOWN} more"] if len(found.where) > _SHOWN else []
            text = Text().append(found.rule.name, style="bold").append(f": {found.rule.says}\n")
            for line in found.where[:_SHOWN] + more:
                text.append(f"    {line}\n", style="dim")
            console.print(text.append(f"  fix: {self._fix(found)}"))
        for note in self.notes:
            console.print(Text(note))

    def _fix(self, found: Finding) -> str:
        first = next((other.rule.name for other in self.findings if other.rule.name in MERGE_ONLY), None)
        if first and found.rule.fix.startswith(PORTABLE):
            return f"Goes away with the fix for {first}."
        return found.rule.fix.replace("ADAPTER", self.adapter)


def check_adapter(adapter: str | Path | Adapter, engine: str = "all", base: Any = None, values: bool = True) -> Report:
    """Say for each engine whether it serves the adapter as it was trained.

    Args:
        adapter: a PEFT adapter folder, or what was read of it. Only headers are read, except to look for NaN and
            infinity.
        engine: one of ``adapter.engines.ENGINES``, or "all".
        base: the base model, its config, its folder or its name on the Hub. None takes the name in the adapter's
            config if its config is on this machine; without a base, rules that need the layers are left out.
        values: False leaves the look for NaN and infinity out.

    Returns:
        A verdict for each engine, with what was found and how to mend it; `ok` where every engine asked for serves it.

    Raises:
        AdapterError: ``adapter`` is no folder, ``engine`` is unknown, or the ``base`` given cannot be read. What
            is wrong inside the folder is a verdict, not an error.

    """
    if engine != "all" and engine not in ENGINES:
        raise AdapterError(f"engine={engine!r} is not known. Choose one of: {', '.join(ENGINES)}, all.")
    engines = list(ENGINES) if engine == "all" else [engine]
    folder = adapter.folder if isinstance(adapter, Adapter) else Path(adapter)
    try:
        files = adapter if isinstance(adapter, Adapter) else read_adapter(folder)
    except AdapterError as error:
        rule = next((rule for rule in UNREADABLE if rule.name == error.rule), None)
        if rule is None:
            raise
        files, findings, (known, note) = None, [Finding(rule, [error.what])], _find_base({}, base)
    else:
        known, note = _find_base(files.config, base)
        findings = apply_rules(files, known, values)
    notes = [note] if note else []
    if files is not None and (not findings or findings[0].rule.name != "bad-number"):
        notes += _notes(files, engines)
    verdicts = {}
    for each in engines:
        found = [finding.rule.verdict(each) for finding in findings]
        verdicts[each] = max(found, key=_SEVERITY.index, default=Verdict.SERVES)
    shown = [f for f in findings if any(f.rule.verdict(each) is not Verdict.SERVES for each in engines)]
    return Report(str(folder), known.name if known else None, verdicts, shown, notes, files)


def _find_base(config: dict[str, Any], base: Any) -> tuple[Base | None, str | None]:
    if base is not None:
        return read_base(base, download=True), None
    try:
        if name := config.get("base_model_name_or_path"):
            return read_base(name), None
    except (OSError, ValueError):
        pass
    return None, "The base is not on this machine: layer names and shapes were not compared. Give it with --base."


def _notes(adapter: Adapter, engines: list[str]) -> list[str]:
    """The flags that engines need, and on how many GPUs they are right."""
    rank, notes = adapter.largest_rank, []
    if rank <= 0:
        return notes
    flags = {ENGINES[name].title: ENGINES[name].flags_for(rank) for name in engines}
    if needs := [f"{title}: {needed}." for title, needed in flags.items() if needed is not None]:
        notes.append(" ".join(needs))
    for per_gpu in dict.fromkeys(ENGINES[name].per_gpu for name in engines):
        if per_gpu is not None and rank % (2 * per_gpu) == 0:  # else a rule says more
            alike = titles([name for name in engines if ENGINES[name].per_gpu == per_gpu])
            notes.append(f"{alike}: right on up to {rank // per_gpu} GPUs; more of them need a larger rank.")
    return notes
