"""A forest plot: paired differences to `lora` with their intervals, accuracy and NLL side by side.

Arms first, then the echo passes of arms that have one, which exist in training only.
"""

from pathlib import Path
from typing import Any

from .arms import BASELINE

METRICS = ("accuracy", "nll")
PANELS = (("accuracy", 100.0, "accuracy, points (right is better)"), ("nll", 1.0, "NLL, nats (left is better)"))
DIFFERS, DOES_NOT, PASS = "C0", "0.3", "C1"
"""Colours: significant after Holm's correction, not significant, of an echo pass."""


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
    from matplotlib.figure import Figure

    rows: list[tuple[str, dict[str, Any]]]
    rows = [(arm, {m: row[m]["to_lora"] for m in METRICS}) for arm, row in part["arms"].items()]
    rows = [(arm, pairs) for arm, pairs in rows if pairs["accuracy"]]
    if not rows:
        return False
    passes = [entry for entry in part["echo_passes"] if entry["other"] == BASELINE]
    rows += [(f"echo pass of {entry['arm']}", {m: entry[m] for m in METRICS}) for entry in passes]
    figure = Figure(figsize=(10, 1.4 + 0.38 * len(rows)), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (metric, scale, label) in zip(axes, PANELS, strict=True):
        for place, (_, pairs) in enumerate(rows):
            pair = pairs[metric]
            is_pass = place >= len(rows) - len(passes)
            color = PASS if is_pass else DIFFERS if pair["holm"] < 0.05 else DOES_NOT
            seeds = [difference * scale for difference in pair["by_seed"]]
            axis.plot(seeds, [place] * len(seeds), "|", color="0.6", markersize=9, zorder=1)
            if pair["low"] == pair["low"]:
                axis.plot([pair["low"] * scale, pair["high"] * scale], [place] * 2, color=color)
            axis.plot(pair["difference"] * scale, place, "D" if is_pass else "o", color=color)
        if passes:  # which exist in training only: below the line nothing is deployed
            axis.axhline(len(rows) - len(passes) - 0.5, color="0.7", linewidth=0.8, linestyle=":")
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlabel(f"difference to lora: {label}")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(rows)), [name for name, _ in rows])
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return True
