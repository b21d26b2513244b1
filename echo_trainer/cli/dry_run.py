"""`echo-trainer sft --dry-run`: a run before it runs, printed."""

from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..method.costs import Cost
from ..quiet import quiet_libraries
from ..recipe.preview import LOOKED_AT, Preview, preview
from ..run.decode import DecodedDocument

PROMPT, ANSWER, BOUNDARY = "dim", "bold green", "black on yellow"
_LONGEST = 600
"""Characters of a prompt or an answer that are shown."""
BYTES_OF_ADAM = 16
"""Of a trained parameter in float32: weight, gradient and two moments."""


def dry_run(arguments: tuple[Any, ...]) -> int:
    """Print what a run comes to; `arguments` as for `recipe.training.run`. Nothing is written."""
    with quiet_libraries():
        found = preview(*arguments)
    console = Console()
    for part in shown(found):
        console.print(part, soft_wrap=not isinstance(part, Table | Padding))
    return 0


def shown(found: Preview) -> list[Any]:
    """The parts of the page, from top to bottom."""
    parts: list[Any] = [Text("Nothing was trained or written: a dry run.\n", "bold"), _facts(found)]
    parts += [Text(f"Note: {note}", "yellow") for note in found.notes]
    parts += [_costs(found), Padding(_what_is_estimated(found), (0, 0, 1, 0))]
    parts.append(_options(found))
    parts.append(Text("\nThe first rows as the model sees them: ", "bold") + _legend())
    parts += [_document(number, document) for number, document in enumerate(found.examples)]
    if found.warnings:
        parts += [Text(f"\nTemplate check: {warning}", "yellow") for warning in found.warnings]
    else:
        parts.append(
            Text("\nTemplate check: training and inference write the first prompt alike, and its end is learned.")
        )
    if found.proved:
        parts.append(Text(f"\nThe proof: {found.proved}"))
    return parts


def _facts(found: Preview) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    name, parameters = found.model
    table.add_row("model", f"{name}, {parameters:,} parameters, {found.layers} decoder layers")
    table.add_row("adapter", f"{found.trainable:,} trainable parameters ({found.trainable / parameters:.2%})")
    if found.sources:
        table.add_row(
            "echo",
            f"from layers {found.sources} to {found.sites} LoRA modules of layers {found.targets}; "
            f"{found.networks:,} parameters in networks that are thrown away after training",
        )
        start, middle, end, mean = found.schedule
        samples = round(mean * found.batch * found.steps)
        table.add_row("routing", f"p {start:g} -> {middle:.2g} -> {end:g}: about {samples:,} samples get an echo pass")
    else:
        table.add_row("echo", "off: plain LoRA, as trl.SFTTrainer trains it")
    rows = "a stream" if found.rows is None else f"{found.rows:,} rows"
    table.add_row("data", f"{rows}, {found.tokens:.0f} tokens each (mean of the first {LOOKED_AT})")
    if found.lost:
        table.add_row("", Text(f"{found.lost:.0%} of them lose their whole answer to max_length", "yellow"))
    accumulated = f" ({found.per_step} micro-batches each)" if found.per_step > 1 else ""
    table.add_row("steps", f"about {found.steps:,} of {found.batch} rows{accumulated}, learning rate {found.rate:g}")
    return table


def _costs(found: Preview) -> Table:
    table = Table(title="one optimizer step of one process, estimated")
    for column in ("", "GFLOP", "of plain", "kept for backward", "of plain"):
        table.add_column(column, justify="left" if not column else "right")
    plain = found.costs["plain"]
    table.add_row("plain LoRA", *_figures(plain.flops, plain.saved_bytes, plain, found.per_step))
    mean = found.schedule[3]
    shares = {1.0: "all routed", mean: f"mean p = {mean:.2g}" if mean < 1 else "all routed"}
    for name, echo in found.costs.items():
        if name != "plain":
            for share, label in shares.items():
                flops = plain.flops + share * echo.flops
                table.add_row(
                    f"{name}, {label}", *_figures(flops, plain.saved_bytes + echo.saved_bytes, plain, found.per_step)
                )
    return table


def _figures(flops: float, kept: float, plain: Cost, per_step: int) -> tuple[str, ...]:
    return (
        f"{flops * per_step / 1e9:,.1f}", f"{flops / plain.flops:.2f}", size(kept), f"{kept / plain.saved_bytes:.2f}"
    )  # fmt: skip


def _what_is_estimated(found: Preview) -> Text:
    trained = (found.trainable + found.networks) * BYTES_OF_ADAM
    return Text(
        f"Matrix products and activations of the decoder layers; the head, kernels' own memory and the optimizer are "
        f"left out. Besides: weights {size(found.model[1] * 2)} in bfloat16 ({size(found.model[1] * 4)} in float32), "
        f"and {size(trained)} for what is trained, with its gradient and Adam's two moments.",
        "dim",
    )


def size(n: float) -> str:
    """Bytes as one reads them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            break
        n /= 1024
    return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"


def _options(found: Preview) -> Table:
    table = Table(title="options that differ from their defaults, presets filled in", show_header=False, box=None)
    table.add_column(style="cyan")
    table.add_column(overflow="fold")
    for name, value in found.options.items():
        table.add_row(name, Text(str(value)))
    return table


def _legend() -> Text:
    return Text.assemble(("prompt", PROMPT), " ", ("boundary", BOUNDARY), " ", ("answer, which is learned", ANSWER))


def _document(number: int, document: DecodedDocument) -> Text:
    text = Text(f"row {number}: ")
    for place, part in enumerate(document.parts):
        if part.answer:
            text.append(_short(part.text), ANSWER)
            continue
        after = document.parts[place + 1] if place + 1 < len(document.parts) else None
        boundary = after.boundary_token if after is not None and after.boundary is not None else ""
        body = part.text.removesuffix(boundary) if boundary else part.text
        text.append(_short(body), PROMPT)
        text.append(boundary, BOUNDARY)
    return text


def _short(text: str) -> str:
    half = _LONGEST // 2
    return text if len(text) <= _LONGEST else f"{text[:half]} [...] {text[-half:]}"
