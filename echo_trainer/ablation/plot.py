"""A forest plot: paired differences to `lora` with their intervals, accuracy and NLL side by side."""

from pathlib import Path
from typing import Any


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

    arms = [arm for arm, row in part["arms"].items() if row["accuracy"]["to_lora"]]
    if not arms:
        return False
    figure = Figure(figsize=(10, 1.4 + 0.38 * len(arms)), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(1, 2, sharey=True)
    panels = (("accuracy", 100.0, "accuracy, points (right is better)"), ("nll", 1.0, "NLL, nats (left is better)"))
    for axis, (metric, scale, label) in zip(axes, panels, strict=True):
        for place, arm in enumerate(arms):
            pair = part["arms"][arm][metric]["to_lora"]
            clear = pair["holm"] < 0.05
            seeds = [difference * scale for difference in pair["by_seed"]]
            axis.plot(seeds, [place] * len(seeds), "|", color="0.6", markersize=9, zorder=1)
            if pair["low"] == pair["low"]:
                axis.plot([pair["low"] * scale, pair["high"] * scale], [place] * 2, color="C0" if clear else "0.3")
            axis.plot(pair["difference"] * scale, place, "o", color="C0" if clear else "0.3")
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlabel(f"difference to lora: {label}")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(arms)), arms)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return True
