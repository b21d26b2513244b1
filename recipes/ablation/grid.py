"""One comparison in all cells of a grid: a table, Holm's correction over the cells, and a plot.

    python recipes/ablation/grid.py recipes/ablation/results/depth --compare strong lora-longer

FOLDER holds a folder `layers-SHARE-examples-N` for each cell with the `summary.json` of `echo-trainer ablate`. Prints
the table, writes FOLDER/grid.json and FOLDER/grid.png.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from echo_trainer.ablation.statistics import holm
from echo_trainer.files import write_json
from echo_trainer.plots import ECHO, INK, PLAIN, figure, legend_below, tidy, write


def cells(folder: Path) -> dict[tuple[float, int], dict[str, Any]]:
    """Summaries by (share of the layers, examples), the smaller share first."""
    found = {}
    for path in folder.glob("layers-*-examples-*/summary.json"):
        share, examples = re.fullmatch(r"layers-([\d.]+)-examples-(\d+)", path.parent.name).groups()
        found[float(share), int(examples)] = json.loads(path.read_text())["lora"]
    return dict(sorted(found.items()))


def compared(cell: dict[str, Any], one: str, other: str) -> dict[str, Any]:
    """`one` minus `other` in a cell: `plain` (deployed), and `echo` where `one` has an echo pass; accuracy and NLL."""
    pair = next((row for row in cell["contrasts"] if (row["one"], row["other"]) == (one, other)), None)
    if pair is None:
        raise SystemExit(f"No cell compares {one} with {other}: there are {', '.join(sorted(pairs_of(cell)))}.")
    metrics = ("accuracy", "nll")
    found = {"plain": {metric: pair[metric] for metric in metrics}}
    for row in cell["echo_passes"]:
        if (row["arm"], row["other"]) == (one, other):
            found["echo"] = {metric: row[metric] for metric in metrics}
    return found


def pairs_of(cell: dict[str, Any]) -> set[str]:
    """The comparisons that a cell has, in words."""
    return {f"{row['one']} - {row['other']}" for row in cell["contrasts"]}


def tell(pair: dict[str, Any], scale: float = 100.0, digits: int = 2) -> str:
    """A difference with its interval."""
    value, low, high = (f"{scale * pair[key]:+.{digits}f}" for key in ("difference", "low", "high"))
    return value if pair["low"] == pair["high"] else f"{value} [{low}, {high}]"


def name_of(share: float, examples: int) -> str:
    """A cell in words."""
    where = {1.0: "all layers", 0.5: "upper half"}.get(share, f"upper {share:.0%} of the layers")
    return f"{where}, {examples:,} examples"


def draw(found: dict[tuple[float, int], dict[str, Any]], path: Path, title: str) -> None:
    """A row for each cell: what is deployed, and the echo pass, which exists in training only."""
    drawn = figure(8, 1.6 + 0.55 * len(found))
    axis = drawn.subplots()
    for place, pairs in enumerate(found.values()):
        for kind, colour, marker, shift in (("plain", PLAIN, "o", -0.12), ("echo", ECHO, "D", 0.12)):
            if kind in pairs:
                low, middle, high = (100 * pairs[kind]["accuracy"][key] for key in ("low", "difference", "high"))
                label = {"plain": "deployed adapter", "echo": "echo pass (training only)"}[kind] if not place else None
                axis.plot([low, high], [place + shift] * 2, color=colour)
                axis.plot(middle, place + shift, marker, color=colour, label=label)
    axis.axvline(0, color=INK, linewidth=0.9)
    axis.set_yticks(range(len(found)), [name_of(*cell) for cell in found])
    axis.invert_yaxis()
    axis.set_xlabel("accuracy, points, 95 % interval (right is better)")
    axis.set_title(title, fontsize=11, color=INK, loc="left")
    tidy(axis, "x")
    legend_below(axis)
    write(drawn, path)


def main() -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--compare", nargs=2, required=True, metavar="ARM", help="the first minus the second")
    options = parser.parse_args()
    one, other = options.compare
    found = {cell: compared(summary, one, other) for cell, summary in cells(options.folder).items()}
    if not found:
        raise SystemExit(f"{options.folder} holds no layers-SHARE-examples-N/summary.json.")
    corrected = holm([pairs["plain"]["accuracy"]["p"] for pairs in found.values()])
    print(f"| {one} - {other} | accuracy, points | p (Holm, {len(found)} cells) | NLL, nats | echo pass, points |")
    print("|---|---|---|---|---|")
    rows = []
    for (cell, pairs), p in zip(found.items(), corrected, strict=True):
        pairs["plain"]["accuracy"]["holm_over_cells"] = p
        echo = tell(pairs["echo"]["accuracy"]) if "echo" in pairs else ""
        plain, nll = tell(pairs["plain"]["accuracy"]), tell(pairs["plain"]["nll"], 1.0, 3)
        print(f"| {name_of(*cell)} | {plain} | {p:.3f} | {nll} | {echo} |")
        rows.append({"share": cell[0], "examples": cell[1], **pairs})
    write_json(options.folder / "grid.json", {"one": one, "other": other, "cells": rows}, indent=2)
    draw(found, options.folder / "grid.png", f"{one} - {other}")


if __name__ == "__main__":
    main()
