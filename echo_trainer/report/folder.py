"""The finished run's folder: `echo_run.json` (record), `assets/*.png` (curves) and `README.md` (model card)."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..adapter.check import Report, check_adapter
from ..adapter.folder import AdapterError
from ..adapter.read import adapter_folder
from ..files import CARD, RUN_RECORD
from .curves import write_curves
from .record import run_record
from .render import render_card


def write_run_folder(
    trainer: Any,
    folder: str,
    saved: dict[str, Any] | None = None,
    dataset_name: str | None = None,
    make_record: Callable[[Any, str | None], dict[str, Any]] = run_record,
) -> None:
    """
    Write record, curves and card of a run beside its adapter. The card comes last: PEFT rewrites README.md on save.

    Args:
        trainer: whose run it was.
        folder: where the adapter is.
        saved: `saved_facts` of the adapter; None where there is none yet.
        dataset_name: public id of the training data, if the caller knows it; else `trainer.dataset_name`.
        make_record: the record of such a trainer.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    record = make_record(trainer, dataset_name or getattr(trainer, "dataset_name", None))
    record["saved"] = saved
    record["evaluation"] = _evaluation_of_the_same(record["saved"], Path(trainer.args.output_dir))
    record["repo_id"] = None  # known when it is pushed
    record["curves"] = write_curves(trainer.state.log_history, path / "assets")
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
