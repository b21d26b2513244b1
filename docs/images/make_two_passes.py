"""Draw `two-passes.svg`: a batch's two passes, and what goes from one to the other.

python docs/images/make_two_passes.py

Its own background, text and colours follow the reader's colour scheme; shapes and words carry the meaning, not colour.
"""

from pathlib import Path

PICTURE = Path(__file__).with_name("two-passes.svg")
WIDTH, HEIGHT = 960, 430
CELL, GAP = 34, 5
LAYERS, TARGET, SOURCE = 6, 1, 4
PROMPT, ANSWER = 5, 3
BOUNDARY = PROMPT - 1
LEFT, RIGHT, TOP = 70, 600, 96

STYLE = """
.page { fill: #ffffff; stroke: #d5dde1 } .text { fill: #20303a } .soft { fill: #5a6b75 }
.prompt { fill: #e4eaed; stroke: #b3c0c7 } .answer { fill: #cfe6ee; stroke: #1f6f8b }
.ghost { fill: none; stroke: #b3c0c7 } .echo { fill: #f3c9a5; stroke: #b3541e }
.source { fill: #ffe08a; stroke: #8a6a00; stroke-width: 2.5 }
.line { stroke: #b3541e; fill: none } .tip { fill: #b3541e }
.kd { stroke: #1f6f8b; fill: none } .kdtip { fill: #1f6f8b }
@media (prefers-color-scheme: dark) {
.page { fill: #1b242b; stroke: #3a4853 } .text { fill: #e6edf1 } .soft { fill: #9fb0ba }
.prompt { fill: #2c3942; stroke: #566773 } .answer { fill: #1d4a5b; stroke: #6fc3de }
.ghost { stroke: #566773 } .echo { fill: #7a4420; stroke: #f0a46c } .source { fill: #8a6a00; stroke: #ffe08a }
.line { stroke: #f0a46c } .tip { fill: #f0a46c } .kd { stroke: #6fc3de } .kdtip { fill: #6fc3de } }
text { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; font-size: 14px }
.head { font-size: 16px; font-weight: 600 } .small { font-size: 12.5px }
.mono { font-family: ui-monospace, "DejaVu Sans Mono", monospace }
"""


def x(start: int, column: int) -> int:
    """Left edge of a column of cells."""
    return start + column * (CELL + GAP)


def y(layer: int) -> int:
    """Upper edge of a layer's cells; deep layers stand on top."""
    return TOP + (LAYERS - 1 - layer) * (CELL + GAP)


def cell(start: int, column: int, layer: int, kind: str) -> str:
    """One token in one layer."""
    dashes = ' stroke-dasharray="3 4"' if kind == "ghost" else ""
    return (
        f'<rect class="{kind}" x="{x(start, column)}" y="{y(layer)}" width="{CELL}" height="{CELL}" rx="5"{dashes}/>'
    )


def text(at_x: float, at_y: float, words: str, kind: str = "text", anchor: str = "middle") -> str:
    """A line of text."""
    return f'<text class="{kind}" x="{at_x}" y="{at_y}" text-anchor="{anchor}">{words}</text>'


def plain_kind(column: int, layer: int) -> str:
    """How the plain pass draws a cell."""
    if (column, layer) == (BOUNDARY, SOURCE):
        return "source"
    return "prompt" if column < PROMPT else "answer"


def echo_kind(column: int, layer: int) -> str:
    """How the echo pass draws a cell: what it shares with the plain pass is not run again."""
    if column < PROMPT or layer < TARGET:
        return "ghost"
    return "echo" if layer == TARGET else "answer"


def draw() -> str:
    """The picture."""
    grid = [(column, layer) for column in range(PROMPT + ANSWER) for layer in range(LAYERS)]
    parts = [cell(LEFT, *place, plain_kind(*place)) for place in grid]
    parts += [cell(RIGHT, *place, echo_kind(*place)) for place in grid]
    middle = [start + (x(0, PROMPT + ANSWER) - GAP) / 2 for start in (LEFT, RIGHT)]
    below = y(0) + CELL
    for start, name, centre in zip((LEFT, RIGHT), ("Plain pass", "Echo pass"), middle, strict=True):
        parts.append(text(centre, 38, name, "text head"))
        parts.append(text((x(start, 0) + x(start, PROMPT) - GAP) / 2, below + 20, "prompt", "soft"))
        parts.append(text((x(start, PROMPT) + x(start, PROMPT + ANSWER) - GAP) / 2, below + 20, "answer", "soft"))
    parts.append(text(x(LEFT, BOUNDARY) + CELL / 2, y(SOURCE) + 22, "h", "text mono"))
    for column in range(PROMPT, PROMPT + ANSWER):
        parts.append(text(x(RIGHT, column) + CELL / 2, y(TARGET) + 22, "+δ", "text mono"))
    parts.append(text(LEFT - 12, y(SOURCE) + 21, "source", "soft small", "end"))
    parts.append(text(LEFT - 12, y(TARGET) + 21, "target", "soft small", "end"))
    shared = (x(RIGHT, 0) + x(RIGHT, PROMPT) - GAP) / 2
    parts.append(text(shared, y(3) - 4, "keys and values", "soft small"))
    parts.append(text(shared, y(3) + 13, "of the plain pass", "soft small"))

    # From the boundary through the networks to the target layer.
    box_x, box_y, box_width, box_height = 396, 196, 172, 92
    parts.append(f'<rect class="echo" x="{box_x}" y="{box_y}" width="{box_width}" height="{box_height}" rx="8"/>')
    centre = box_x + box_width / 2
    parts.append(text(centre, box_y + 24, "echo z", "text"))
    parts.append(text(centre, box_y + 47, "δ = λ · g(z) · e(z)", "text mono"))
    parts.append(text(centre, box_y + 70, "training only", "text small"))
    start_x, start_y = x(LEFT, BOUNDARY) + CELL, y(SOURCE) + CELL / 2
    parts.append(f'<path class="line" stroke-width="2.5" marker-end="url(#tip)" '
                 f'd="M {start_x} {start_y} C 340 {start_y}, {centre} 130, {centre} {box_y - 5}"/>')  # fmt: skip
    end_x, end_y, below_box = x(RIGHT, PROMPT) - 3, y(TARGET) + CELL / 2, box_y + box_height
    parts.append(f'<path class="line" stroke-width="2.5" marker-end="url(#tip)" '
                 f'd="M {centre} {below_box} C {centre} 345, 690 {end_y + 46}, {end_x} {end_y + 4}"/>')  # fmt: skip

    # Losses on top.
    ends = [(x(start, PROMPT) + x(start, PROMPT + ANSWER) - GAP) / 2 for start in (LEFT, RIGHT)]
    parts.append(text(ends[0], TOP - 16, "CE plain", "text"))
    parts.append(text(ends[1], TOP - 16, "CE echo", "text"))
    parts.append(f'<path class="kd" stroke-width="2.5" marker-end="url(#kdtip)" stroke-dasharray="7 4" '
                 f'd="M {ends[1] - 38} {TOP - 21} L {ends[0] + 44} {TOP - 21}"/>')  # fmt: skip
    parts.append(text(sum(ends) / 2, TOP - 30, "distillation: the plain path learns from the echo pass", "soft small"))
    runs = "The echo pass runs the answers alone, from the target layer up, and only for samples that are routed."
    left = "After training the echo is thrown away. What is saved is an ordinary LoRA adapter: the plain pass."
    parts.append(text(WIDTH / 2, HEIGHT - 42, runs, "soft"))
    parts.append(text(WIDTH / 2, HEIGHT - 20, left))
    tips = "".join(
        f'<marker id="{name}" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="6" markerHeight="6" orient="auto">'
        f'<path class="{name}" d="M 0 0 L 10 5 L 0 10 z"/></marker>'
        for name in ("tip", "kdtip")
    )
    title = "The plain pass and the echo pass of a batch"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n<defs>{tips}</defs>\n"
        f'<rect class="page" x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="12"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
