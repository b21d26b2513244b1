"""One style for all plots: legible at the size of a model card, for colour-blind readers and in print."""

from pathlib import Path
from typing import Any, Literal

PLAIN, ECHO, THIRD, FOURTH, GREY = "#1f6f8b", "#c8581a", "#7b5aa6", "#3c8d5a", "#8a979e"
"""Colours of what is drawn; they differ in lightness too, and lines differ in their dashes as well."""
INK = "#20303a"
DASHES = ("-", "--", "-.", ":")
DPI = 140


def figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Any:
    """
    An empty figure on white, whatever page it is put on.

    Args:
        width, height: in inches.
        layout: of matplotlib; None leaves the margins to the caller. Looking for them draws everything three times.
    """
    # Imported here: matplotlib takes a while, and only who draws should wait for it.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout, facecolor="white")


def tidy(axis: Any, grid: str = "y") -> None:
    """Leave of an axis what carries meaning; `grid` is "x", "y" or "both"."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(GREY)
    axis.tick_params(colors=INK, labelsize=10)
    axis.xaxis.label.set(color=INK, size=10.5)
    axis.yaxis.label.set(color=INK, size=10.5)
    axis.grid(axis=grid, color="#d9e0e4", linewidth=0.8)
    axis.set_axisbelow(True)


def legend_below(axis: Any, columns: int = 2) -> None:
    """The legend below an axis, where it hides nothing."""
    if axis.get_legend_handles_labels()[0]:
        axis.legend(
            frameon=False,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.2),
            ncols=columns,
            fontsize=9,
            labelcolor=INK,
            columnspacing=1,
        )


def write(drawn: Any, path: str | Path) -> Path:
    """Write a figure as PNG; the folder is made. The same figure gives the same bytes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=DPI, metadata={"Software": None})
    return path
