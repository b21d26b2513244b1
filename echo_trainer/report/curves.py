"""The picture of a run: both cross-entropies of the same samples, whether the echo does anything, what it knows."""

import math
from pathlib import Path
from typing import Any

from ..plots import DASHES, ECHO, FOURTH, GREY, INK, PLAIN, THIRD, figure, legend_below, tidy, write

NOTHING = 0.02
"""Below this size, relative to the output of the modules, an echo does next to nothing."""


def write_curves(history: list[dict[str, Any]], folder: Path) -> list[str]:
    """Draw the training curves; names of the files written, relative to the run's folder."""
    steps = [entry for entry in history if "loss" in entry]
    if len(steps) < 2:
        return []
    echo = any("echo/ce_echo" in entry for entry in steps)
    beams = any("beams/right" in entry for entry in steps)
    width = 13.5 if echo else 6
    drawn = figure(width, 4, layout=None)  # drawn at every checkpoint, so the margins are set by hand
    drawn.subplots_adjust(left=0.75 / width, right=1 - 0.1 / width, bottom=0.29, top=0.93, wspace=0.28)
    axes = drawn.subplots(1, 3 if echo else 1, squeeze=False)[0]
    if echo:
        # Of the same samples: those without an echo pass would make a gap between the curves that is no effect.
        losses = {"echo/ce_plain_routed": "plain, routed samples", "echo/ce_echo": "echo, same samples",
                  "echo/kd": "distillation"}  # fmt: skip
    elif beams:  # the loss of GRPO starts at zero and says nothing
        losses = {
            "beams/any_right": "best of the beams",
            "beams/first_right": "first beam",
            "beams/right": "all beams",
        }
    else:
        losses = {"loss": "training loss"}
    _lines(axes[0], steps, losses, (PLAIN, ECHO, THIRD))
    axes[0].set_ylabel("right, share of training prompts" if beams else "nats per answer token")
    evaluated = {"eval_beams/first_right": "first beam, evaluation"} if beams else {"eval_loss": "plain, evaluation"}
    _points(axes[0], history, evaluated, FOURTH)
    if echo:
        at_work = {"echo/relative_delta": "echo / output", "echo/agreement": "same top token",
                   "echo/p": "routing p", "echo/gate": "mean gate"}  # fmt: skip
        _lines(axes[1], steps, at_work, (ECHO, PLAIN, THIRD, FOURTH))
        axes[1].set(ylabel="share", ylim=(-0.02, 1.02))
        axes[1].set_title(what_it_does(steps), fontsize=10.5, color=INK, loc="left")
        gains = [
            {"step": entry["step"], "gain": entry["echo/ce_plain_routed"] - entry["echo/ce_echo"]}
            for entry in steps
            if {"echo/ce_plain_routed", "echo/ce_echo"} <= set(entry)
        ]
        _lines(axes[2], gains, {"gain": "training (flatters)"}, (ECHO,))
        axes[2].set_ylabel("CE plain - CE echo, nats per token")
        axes[2].axhline(0, color=INK, linewidth=0.9)
        _intervals(axes[2], history)
    for axis in axes:
        axis.set_xlabel("optimizer step")
        tidy(axis)
        legend_below(axis)
    write(drawn, folder / "training.png")
    return ["assets/training.png"]


def what_it_does(steps: list[dict[str, Any]]) -> str:
    """Whether the echo changes anything, by the size of what it adds at its largest."""
    sizes = [entry["echo/relative_delta"] for entry in steps if "echo/relative_delta" in entry]
    largest = max(sizes, default=0.0)
    if largest < NOTHING:
        return f"The echo does next to nothing (at most {largest:.1%})"
    return f"The echo adds up to {largest:.0%} of the output"


def _numbers(entries: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [
        (entry["step"], entry[key])
        for entry in entries
        if isinstance(entry.get(key), int | float) and math.isfinite(entry[key])
    ]


def _lines(axis: Any, entries: list[dict[str, Any]], curves: dict[str, str], colours: tuple[str, ...]) -> None:
    for (key, label), colour, dashes in zip(curves.items(), colours, DASHES, strict=False):
        points = _numbers(entries, key)
        if points:
            axis.plot(*zip(*points, strict=True), label=label, color=colour, linestyle=dashes, linewidth=1.8)


def _points(axis: Any, history: list[dict[str, Any]], curves: dict[str, str], colour: str) -> None:
    for key, label in curves.items():
        points = _numbers(history, key)
        if points:
            axis.plot(*zip(*points, strict=True), label=label, color=colour, marker="o", linewidth=1.2)


def _intervals(axis: Any, history: list[dict[str, Any]]) -> None:
    """
    What the echo pass knows that the plain pass does not, and that it does not with another echo, on held-out rows.

    Over the tokens in which answers differ where they have others too: both are measured on them then.
    """
    for prefix, rows, colours in (
        ("eval_echo_", "evaluation", (PLAIN, FOURTH)),
        ("echo/held_out_", "held-out rows", (THIRD, GREY)),
    ):
        content = any(f"{prefix}advantage_content" in entry for entry in history)
        figures = {
            "advantage_content" if content else "advantage": f"{rows}, 95 %",
            "own": "CE other's echo - CE echo",
        }
        for (key, label), colour in zip(figures.items(), colours, strict=True):
            found = [entry for entry in history if math.isfinite(entry.get(f"{prefix}{key}_se", math.nan))]
            if not found:
                continue
            places = [[entry[name] for entry in found] for name in ("step", f"{prefix}{key}")]
            # matplotlib draws +- the error: 1.96 standard errors are the 95 % interval
            errors = [1.96 * entry[f"{prefix}{key}_se"] for entry in found]
            axis.errorbar(*places, errors, label=label, color=colour, marker="o", linewidth=1.4, capsize=3)
