"""A forest plot: paired differences to `lora` with their intervals, accuracy and NLL side by side.

Arms first, then the echo passes of arms that have one, which exist in training only.
"""

from pathlib import Path
from typing import Any

from ..plots import ECHO, GREY, INK, PLAIN, figure, tidy, write
from .arms import BASELINE

METRICS = ("accuracy", "nll")
PANELS = (("accuracy", 100.0, "accuracy, points (right is better)"), ("nll", 1.0, "NLL, nats (left is better)"))
DIFFERS, DOES_NOT, PASS = PLAIN, INK, ECHO
"""Colours: significant after Holm's correction, not significant (hollow), of an echo pass (a diamond)."""


def forest_plot(part: dict[str, Any], path: Path, title: str) -> bool:
    """
    Draw one adapter's comparisons.

    Args:
        part: one adapter's part of `comparison.summarise`.
        path: the PNG to write.
        title: above the plot.

    Returns:
        Whether there was anything to draw.
    """
    rows: list[tuple[str, dict[str, Any]]]
    rows = [(arm, {m: row[m]["to_lora"] for m in METRICS}) for arm, row in part["arms"].items()]
    rows = [(arm, pairs) for arm, pairs in rows if pairs["accuracy"]]
    if not rows:
        return False
    passes = [entry for entry in part["echo_passes"] if entry["other"] == BASELINE]
    rows += [(f"echo pass of {entry['arm']}", {m: entry[m] for m in METRICS}) for entry in passes]
    drawn = figure(10, 1.4 + 0.38 * len(rows))
    drawn.suptitle(title, fontsize=12, color=INK)
    axes = drawn.subplots(1, 2, sharey=True)
    for axis, (metric, scale, label) in zip(axes, PANELS, strict=True):
        for place, (_, pairs) in enumerate(rows):
            pair = pairs[metric]
            is_pass = place >= len(rows) - len(passes)
            color = PASS if is_pass else DIFFERS if pair["holm"] < 0.05 else DOES_NOT
            face = "white" if color == DOES_NOT else color
            seeds = [difference * scale for difference in pair["by_seed"]]
            axis.plot(seeds, [place] * len(seeds), "|", color=GREY, markersize=9, zorder=1)
            if pair["low"] == pair["low"]:
                axis.plot([pair["low"] * scale, pair["high"] * scale], [place] * 2, color=color)
            axis.plot(pair["difference"] * scale, place, "D" if is_pass else "o", color=color, markerfacecolor=face)
        if passes:  # which exist in training only: below the line nothing is deployed
            axis.axhline(len(rows) - len(passes) - 0.5, color=GREY, linewidth=0.9, linestyle=":")
        axis.axvline(0, color=INK, linewidth=0.9)
        axis.set_xlabel(f"difference to lora: {label}")
        tidy(axis, "x")
    axes[0].set_yticks(range(len(rows)), [name for name, _ in rows])
    axes[0].invert_yaxis()
    write(drawn, path)
    return True
