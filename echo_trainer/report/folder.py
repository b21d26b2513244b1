"""The finished run's folder: `echo_run.json` (record), `assets/*.png` (curves) and `README.md` (model card)."""

import json
import math
from pathlib import Path
from typing import Any

from ..adapter.check import Report, check_adapter
from ..adapter.folder import AdapterError
from ..adapter.read import adapter_folder
from ..files import CARD, RUN_RECORD
from .record import run_record
from .render import render_card


def write_run_folder(
    trainer: Any, folder: str, saved: dict[str, Any] | None = None, dataset_name: str | None = None
) -> None:
    """
    Write record, curves and card of a run beside its adapter. The card comes last: PEFT rewrites README.md on save.

    Args:
        trainer: an `EchoSFTTrainer`.
        folder: where the adapter is.
        saved: `saved_facts` of the adapter; None where there is none yet.
        dataset_name: public id of the training data, if the caller knows it; else `trainer.dataset_name`.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    record = run_record(trainer, dataset_name or getattr(trainer, "dataset_name", None))
    record["saved"] = saved
    record["evaluation"] = _evaluation_of_the_same(record["saved"], Path(trainer.args.output_dir))
    record["repo_id"] = None  # known when it is pushed
    record["curves"] = _write_curves(trainer.state.log_history, path / "assets")
    _write(path, _finite(record))


def update_record(folder: Path, base: Any = None, saved: dict[str, Any] | None = None, **changes: Any) -> bool:
    """
    Change entries of a run's record, and make its card again; what the adapter's files say is read again as well.

    Args:
        folder: a finished run's folder, or a copy of it.
        base: the base or its config, for the engines' verdicts; None takes the name in the adapter's config.
        saved: `saved_facts` of the adapter in the folder, where they are known; None reads them.
        changes: new values, such as `evaluation` (results), `base_model` or `repo_id` (ids on the Hub).

    Returns:
        Whether the card was written. False where there is no record, or the card was edited by hand; then only the
        record is written.
    """
    path = folder / RUN_RECORD
    if not path.is_file():
        return False
    record = json.loads(path.read_text(encoding="utf-8"))
    if "saved" not in record:  # of an older version
        return False
    record.setdefault("prompt_format", None)  # records of before there was one
    record["steps"] = {"adapter": record["steps"]["done"], "best_by": None, **record["steps"]}
    card = folder / CARD
    edited = card.is_file() and card.read_text(encoding="utf-8") != render_card(record)
    saved = saved or saved_facts(_report(folder, base))
    if saved is not None and record["saved"] is not None and saved["sha256"] == record["saved"]["sha256"]:
        saved["engines"] = record["saved"]["engines"]  # found with the base at hand
    record |= {**changes, "saved": saved}
    _write(folder, record, card=not edited)
    return not edited


def saved_facts(report: Report | None) -> dict[str, Any] | None:
    """What the adapter's files themselves say: method, rank, size, checksum, and which engines serve them."""
    if report is None or report.files is None:
        return None
    adapter = report.files
    return {
        "method": "DoRA" if adapter.config.get("use_dora") else "LoRA",
        "rank": adapter.largest_rank,
        "alpha": adapter.config.get("lora_alpha"),
        "parameters": adapter.n_parameters,
        "dtype": "/".join(sorted({tensor.dtype for tensor in adapter.tensors.values()})),
        "bytes": adapter.weights.stat().st_size,
        "sha256": adapter.digest,
        "engines": {engine: str(verdict) for engine, verdict in report.verdicts.items()},
    }


def _report(folder: Path, base: Any) -> Report | None:
    """The adapter in a folder; None where there is none that can be read."""
    try:
        return check_adapter(adapter_folder(folder), base=base, values=False)
    except AdapterError:
        return None


def _write(folder: Path, record: dict[str, Any], card: bool = True) -> None:
    text = json.dumps(record, indent=2, sort_keys=True, allow_nan=False)
    (folder / RUN_RECORD).write_text(text + "\n", encoding="utf-8")
    if card:
        # From the text just written: what is on the card can be made again from the record alone.
        (folder / CARD).write_text(render_card(json.loads(text)), encoding="utf-8")


def _evaluation_of_the_same(saved: dict[str, Any] | None, folder: Path) -> list[dict[str, Any]] | None:
    """Results that were written into an earlier record of exactly this adapter."""
    path = folder / RUN_RECORD
    if saved is None or not path.is_file():
        return None
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        return earlier["evaluation"] if earlier["saved"]["sha256"] == saved["sha256"] else None
    except (ValueError, KeyError, TypeError):
        return None


def _finite(value: Any) -> Any:
    """The value with NaN and infinity as text, which JSON cannot hold as numbers."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _write_curves(history: list[dict[str, Any]], folder: Path) -> list[str]:
    """Draw the training curves; names of the files written, relative to the run's folder."""
    steps = [entry for entry in history if "loss" in entry]
    if len(steps) < 2:
        return []
    # Imported here: pyplot takes a second, and only runs that have something to draw should pay it.
    from matplotlib.figure import Figure

    echo = any("echo/ce_echo" in entry for entry in steps)
    width = 13 if echo else 6
    figure = Figure(figsize=(width, 3.6))
    # Margins by hand: looking for them draws everything three times, at every checkpoint.
    figure.subplots_adjust(left=0.75 / width, right=1 - 0.1 / width, bottom=0.26, top=0.97, wspace=0.22)
    axes = figure.subplots(1, 3 if echo else 1, squeeze=False)[0]
    curves = (("echo/ce_plain", "plain path"), ("echo/ce_echo", "echo pass")) if echo else (("loss", "training loss"),)
    _plot(axes[0], steps, curves, "cross-entropy, nats per answer token")
    held_out = [entry for entry in history if "eval_loss" in entry]
    if held_out:
        _plot(axes[0], held_out, (("eval_loss", "evaluation split"),), axes[0].get_ylabel(), marker="o")
    if echo:
        curves = (("echo/agreement", "same top token"), ("echo/p", "routing probability"), ("echo/gate", "mean gate"))
        _plot(axes[1], steps, curves, "share")
        axes[1].set_ylim(-0.02, 1.02)
        _plot_advantage(axes[2], steps, history)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "training.png", dpi=130)
    return ["assets/training.png"]


def _plot_advantage(axis: Any, steps: list[dict[str, Any]], history: list[dict[str, Any]]) -> None:
    """What the echo pass knows that the plain pass does not: in training, and where it counts, on held-out rows."""
    curves = (("echo/advantage", "training batches"),)
    _plot(axis, steps, curves, "CE_plain - CE_echo, nats per token")
    for prefix, name in (("eval_echo_", "evaluation split"), ("echo/held_out_", "held-out rows")):
        key = f"{prefix}advantage"
        found = [entry for entry in history if math.isfinite(entry.get(f"{key}_se", math.nan))]
        if found:
            places = [[entry[name] for entry in found] for name in ("step", key)]
            # matplotlib draws +- the error: 1.96 standard errors are the 95 % interval
            errors = [1.96 * entry[f"{key}_se"] for entry in found]
            axis.errorbar(*places, errors, label=f"{name}, 95 %", marker="o", linewidth=1.4, capsize=2)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, fontsize=9)


def _plot(axis: Any, entries: list[dict[str, Any]], curves: Any, label: str, marker: str = "") -> None:
    for key, name in curves:
        points = [
            (e["step"], e[key]) for e in entries if isinstance(e.get(key), int | float) and math.isfinite(e[key])
        ]
        if points:
            axis.plot(*zip(*points, strict=True), label=name, linewidth=1.4, marker=marker)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, fontsize=9)
