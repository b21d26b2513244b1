"""An adapter in the form that a server wants: portable, merged into the base, or a LoRA fitted to a DoRA.

GGUF is in `export/gguf.py`. Each function writes a new folder, in one step at the end, and says how far the result's
logits are from what PEFT computes with the original adapter in float32. Errors are measured on `probe_ids`: fixed
token sequences, all positions; logits have no unit, so `LogitError` puts them beside what the adapter itself changes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapter.base import read_base
from ..adapter.folder import AdapterError
from ..adapter.logit_error import (
    LogitError,
    base_name,
    load_base,
    logit_error,
    logits_of,
    probe_ids,
    reference,
    require_equal,
    with_adapter,
)
from ..adapter.portable import make_portable
from ..adapter.read import read_adapter
from ..adapter.refuse import ExportError, refuse_broken
from ..adapter.write import RECORD, TOKENIZER, copy_besides
from ..files import new_folder
from ..report.renew import remove_record, renew_record
from .merge import cast_weights, merge

if TYPE_CHECKING:
    import torch

DTYPES = ("bfloat16", "float16", "float32")


def export_portable(adapter: str | Path, out: str | Path, base: Any = None, rank: int | None = None) -> Path:
    """Write the portable form (see `adapter.portable`) to a new folder; logits do not change.

    So results measured on the trained form stay on the card; rank, size and checksum are those of the new files.
    """
    source = read_adapter(adapter)
    refuse_broken(source, None)  # what is broken on any base is said before one is asked for
    refuse_broken(source, read_base(base_name(adapter, base), download=True))
    with new_folder(_place(out)) as stage:
        make_portable(source, base, stage, rank)
        renew_record(stage, base)
    return Path(out)


def export_merged(
    adapter: str | Path, out: str | Path, base: str | Path | None = None, dtype: str = "bfloat16"
) -> LogitError:
    """Merge the adapter into the base and save an ordinary model, which every engine serves without LoRA support.

    Works for DoRA, saved modules and the rest as well. Merging is done in float32 and checked: in float32 the merged
    model must equal PEFT's, and the files read back must equal the rounded weights. What remains is the rounding to
    ``dtype``, which is returned. The adapter's card, record and results do not come along: they speak of an adapter.

    Raises:
        ExportError: the adapter is broken, or the merged model is not equal to base + adapter.

    """
    import torch

    if dtype not in DTYPES:
        raise AdapterError(f"dtype={dtype!r} is not supported. Choose one of: {', '.join(DTYPES)}.")
    original, plain, model = reference(adapter, base)
    ids = probe_ids(model.config)
    model = merge(model)
    require_equal(logits_of(model, ids), original, "merging in float32")
    cast_weights(model, getattr(torch, dtype))
    with new_folder(_place(out)) as stage:
        model.save_pretrained(stage)
        _save_tokenizer(adapter, base, stage)
        cast_weights(model, torch.float32)
        rounded = logits_of(model, ids)
        del model
        saved = logits_of(load_base(stage), ids)
        require_equal(saved, rounded, "reading the saved model back")
    return logit_error(saved, original, plain)


def export_lora(
    adapter: str | Path, out: str | Path, base: str | Path | None = None, rank: int | float | None = None
) -> LogitError:
    """Fit an ordinary LoRA to a DoRA adapter (peft.convert_to_lora: a truncated SVD of each weight change).

    DoRA's change of the weight has full rank, so this loses something at any rank; the error is measured and returned.
    The run's record comes along, and the card says what it was derived from; results measured on the DoRA do not.

    Args:
        adapter: the DoRA adapter's folder.
        out: the folder to write, in the portable form.
        base: the base model; None takes the name in the adapter's config.
        rank: the rank of the LoRA, or the share of the change to keep (0 < share < 1, which chooses a rank for each
            module). None: 4 times the adapter's rank, at least 64. Never more than the smallest layer allows.

    """
    from peft import convert_to_lora
    from safetensors.torch import save_file

    source = read_adapter(adapter)
    for name in ("modules_to_save", "trainable_token_indices"):
        if source.config.get(name):
            raise AdapterError(f"{name}={source.config[name]} cannot become a LoRA. Use `echo-trainer export "
                               f"--merged`.")  # fmt: skip
    original, plain, model = reference(adapter, base)
    smallest = min(min(shape[0][1], shape[1][0]) for m in source.complete if (shape := source.shapes(m)))
    trained = max(source.rank(m) for m in source.complete)
    if rank is None:
        rank = max(64, 4 * trained)
    if isinstance(rank, int):
        rank = min(rank, smallest)
    try:
        with _true_weight_changes(model):
            config, tensors = convert_to_lora(model, rank=rank)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"peft cannot convert this adapter with rank={rank}: {error}") from error
    config.task_type = source.config.get("task_type")
    config.base_model_name_or_path = source.config.get("base_model_name_or_path")
    config.fan_in_fan_out = bool(source.config.get("fan_in_fan_out"))
    config.layers_to_transform = config.layers_pattern = None  # the tensors say which layers
    base_model = model.unload()
    with new_folder(_place(out)) as stage, tempfile.TemporaryDirectory() as fitted:
        config.save_pretrained(fitted)
        save_file(tensors, Path(fitted) / "adapter_model.safetensors", metadata={"format": "pt"})
        copy_besides(Path(adapter), Path(fitted), TOKENIZER)
        make_portable(fitted, base_model, stage)
        fitted_model = with_adapter(base_model, read_adapter(stage), autocast_adapter_dtype=False)
        exported = logits_of(fitted_model, probe_ids(base_model.config))
        error = logit_error(exported, original, plain)
        copy_besides(Path(adapter), stage, RECORD)
        size = f"of rank {rank}" if isinstance(rank, int) else f"that keeps {rank:g} of each weight change,"
        if not renew_record(stage, base_model, evaluation=None, repo_id=None, derived=(
            f"a LoRA {size} fitted to the {'DoRA' if source.config.get('use_dora') else 'LoRA'} adapter with sha256 "
            f"`{source.digest}` ({error}; on random tokens)"
        )):  # fmt: skip
            remove_record(stage)
    return error


@contextmanager
def _true_weight_changes(model: Any) -> Iterator[None]:
    """Let ``get_delta_weight`` return what merging adds to each weight.

    PEFT 0.21's own returns s B A, for DoRA as well, so its converter would drop the magnitudes without a word.
    """
    from peft.tuners.lora import LoraLayer

    modules: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for module in modules:
        module.get_delta_weight = partial(_change_by_merging, module)
    try:
        yield
    finally:
        for module in modules:
            vars(module).pop("get_delta_weight", None)


def _change_by_merging(module: Any, adapter_name: str) -> torch.Tensor:
    replaced = vars(module).pop("get_delta_weight")  # merging calls PEFT's own
    weight = module.get_base_layer().weight
    before = weight.data.clone()
    try:
        module.merge()
        return weight.data - before
    finally:
        module.unmerge()
        weight.data = before  # unmerging rounds
        module.get_delta_weight = replaced


def _save_tokenizer(adapter: str | Path, base: str | Path | None, out: Path) -> None:
    """The tokenizer of the adapter's folder, or else of the base, and the processor of a model of images or sounds."""
    from transformers import AutoProcessor, AutoTokenizer

    for place in (adapter, base_name(adapter, base)):
        for kind in (AutoTokenizer, AutoProcessor):
            with suppress(OSError, ValueError, TypeError, KeyError, ImportError):
                kind.from_pretrained(place).save_pretrained(out)
        if any(path for pattern in TOKENIZER for path in out.glob(pattern)):
            return


def _place(out: str | Path) -> Path:
    """The folder to write, which must not be there yet."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"'{out}' exists already. Choose a new folder, or remove it first.")
    return out
