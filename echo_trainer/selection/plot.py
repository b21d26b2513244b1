"""The picture of a layer selection: how much each layer changes the representation, and how sure the choice is."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..plots import INK, PLAIN, figure, tidy, write

if TYPE_CHECKING:
    from .select import LayerSelection


LIGHT = "#c9d2d7"


def plot_selection(selection: "LayerSelection", path: str | Path) -> Path:
    """Write the plot; the folder is made. Above: importance with 95 % intervals; below: stability. Gives the path."""
    from matplotlib.patches import Patch

    layers = list(range(selection.num_layers))
    colours = [PLAIN if i in selection.layers else LIGHT for i in layers]
    # a percentile interval need not hold the point estimate, so the lines are drawn from bound to bound
    low, high = zip(*selection.intervals, strict=True)

    drawn = figure(max(6.5, 0.32 * len(layers)), 5.0)
    upper, lower = drawn.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.bar(layers, selection.importance, color=colours)
    upper.vlines(layers, low, high, color=INK, linewidth=1.2)
    smallest = min(v for v in selection.importance if v > 0) if max(selection.importance) > 0 else 1.0
    if max(selection.importance) > 30 * smallest:
        upper.set_yscale("log")
        upper.set_ylim(bottom=smallest / 2)
    upper.set_ylabel("importance 1 - CKA")
    counts = f"{len(selection.layers)} of {selection.num_layers} layers by {selection.method} CKA"
    source = f"{selection.n_samples} samples, {selection.n_bootstrap} bootstrap draws"
    upper.set_title(f"{counts}; {source}", fontsize=10, loc="left")
    handles = [Patch(color=PLAIN, label="chosen"), Patch(color=LIGHT, label="left frozen")]
    drawn.legend(handles=handles, frameon=False, loc="outside lower center", ncols=2)
    lower.bar(layers, selection.stability, color=colours)
    lower.set_ylim(0, 1.05)
    lower.set_ylabel("stability")
    lower.set_xlabel("layer")
    lower.set_xticks(layers[:: max(1, len(layers) // 16)])
    for axis in (upper, lower):
        tidy(axis)
    return write(drawn, path)
