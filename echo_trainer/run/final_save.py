"""The final adapter: finite, equal to what was trained, in the form that engines serve, and moved into place whole."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..adapter.check import Report, check_adapter
from ..adapter.folder import CONFIG_NAME, PREFIX, WEIGHTS_NAME, Adapter, AdapterError
from ..adapter.portable import NotPortableError, make_portable
from ..adapter.read import read_adapter
from ..adapter.rules import Verdict
from ..adapter.vocabulary import embedding_names, rows_of_config, saved_rows
from .checkpoint_files import last_whole_checkpoint

logger = logging.getLogger(__name__)

PROBES = 4
TOLERANCE = 1e-5


class NonFiniteAdapterError(ArithmeticError):
    """The adapter holds NaN or infinity; in a serving engine it would corrupt other users' requests."""


def trained_tensors(model: Any, state_dict: dict[str, Tensor] | None) -> dict[str, dict[str, Tensor]]:
    """The tensors of every adapter by the names they are saved under; `state_dict` where an engine has gathered it."""
    if not hasattr(model, "peft_config"):
        return {}
    return {
        name: get_peft_model_state_dict(model, state_dict=state_dict, adapter_name=name, save_embedding_layers=False)
        for name in model.peft_config
    }


def refuse_non_finite(adapters: dict[str, dict[str, Tensor]], output_dir: str) -> None:
    """
    Stop before anything is written.

    Args:
        adapters: from `trained_tensors`.
        output_dir: where to look for a checkpoint to go back to.

    Raises:
        NonFiniteAdapterError: a tensor holds NaN or infinity.
    """
    bad = [
        key
        for tensors in adapters.values()
        for key, value in tensors.items()
        if value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]
    if bad:
        last_whole, _ = last_whole_checkpoint(output_dir)
        back = f"The last whole checkpoint is {last_whole}." if last_whole else "There is no checkpoint to go back to."
        raise NonFiniteAdapterError(
            f"{len(bad)} tensors of the adapter hold NaN or infinity, such as {bad[0]!r}: training diverged. Nothing "
            f"was written, and an adapter saved before is as it was. {back} Start a new run from "
            f"its adapter, PeftModel.from_pretrained(model, CHECKPOINT, is_trainable=True), with a lower "
            f"learning_rate or max_grad_norm; a resumed run would keep the old rate."
        )


def adapter_folders(folder: str | Path, adapters: dict[str, Any]) -> Iterator[tuple[str, Path]]:
    """Where PEFT saves each adapter: the default one in the folder itself, others in a folder of their name."""
    for name in adapters:
        yield name, Path(folder) if name == "default" else Path(folder, name)


def keep_trained(folder: str | Path, model: Any) -> None:
    """
    Take adapters that are not active out of a folder that PEFT has just saved all of them to.

    They were not trained, and lie where they were loaded from; a frozen one called "default" would be in the place
    where the trained one is looked for.
    """
    for name, path in adapter_folders(folder, model.peft_config):
        if name in model.active_adapters:
            continue
        logger.info("The adapter %r was not trained and is not saved once more.", name)
        if name == "default":
            for file in (CONFIG_NAME, WEIGHTS_NAME):
                Path(path, file).unlink(missing_ok=True)
        else:
            shutil.rmtree(path)


def save_new_rows(folder: str | Path, model: Any, state_dict: dict[str, Tensor] | None) -> None:
    """
    Save the embeddings with an adapter of a resized vocabulary, those that PEFT did not.

    PEFT asks the Hub what the base's vocabulary is, and takes no answer for "not resized"; and it leaves out the head
    where the embedding has a LoRA.
    """
    base, rows = model.get_base_model(), rows_of_config(model.config)
    tensors = base.state_dict() if state_dict is None else state_dict
    names = embedding_names(base)
    if rows is None:
        return
    for _, path in adapter_folders(folder, model.active_adapters):
        adapter, missing = read_adapter(path), {}
        for name in (name for name in names if saved_rows(adapter, (name,)) is None):
            for inside in ("", "base_layer.", "token_adapter.base_layer."):
                key = f"{PREFIX}{name}.{inside}weight"
                weight = tensors.get(key, tensors.get(key.removeprefix(PREFIX)))
                if weight is not None and weight.shape[0] > rows:
                    missing[key] = weight.detach().cpu().clone()
        if missing:
            save_file(load_file(adapter.weights) | missing, adapter.weights, metadata={"format": "pt"})


def compare_written(folder: str | Path, adapters: dict[str, dict[str, Tensor]]) -> None:
    """
    Load what was written and compare it with the tensors in memory, bit for bit.

    Raises:
        OSError: a tensor is missing or another one.
    """
    for name, path in adapter_folders(folder, adapters):
        written = load_file(path / WEIGHTS_NAME)
        for key, value in adapters[name].items():
            if key not in written or not _identical(written[key], value.detach().cpu()):
                raise OSError(
                    f"What was written to {path / WEIGHTS_NAME} is not what was trained: {key!r} "
                    f"{'is missing' if key not in written else 'has other values'}. Look after the disk, then call "
                    f"save_model() again; the trained adapter is still in memory."
                )


def finish_adapter(folder: str | Path, model: Any, portable: bool, shown_as: str | Path) -> Report | None:
    """
    Bring a saved adapter into the portable form, if asked, and say which engines would not serve it as trained.

    Returns:
        What engines will do with it, and the adapter as it was read; None for a model without an adapter.

    Args:
        folder: where PEFT has just saved the adapter.
        model: the PeftModel; only the shapes of its base are used.
        portable: whether to rewrite. What is not plain LoRA (DoRA, saved modules) keeps its form.
        shown_as: the folder that messages name; `folder` may be a staging folder.

    Raises:
        OSError: the rewritten adapter is another function.
    """
    if not hasattr(model, "peft_config"):
        return None
    base = model.get_base_model()
    active = dict(adapter_folders(folder, model.peft_config))[model.active_adapters[0]]
    adapter = None
    try:
        if portable:
            adapter = read_adapter(active)
            as_trained, trained = adapter.config, _probe_outputs(adapter)
            adapter = read_adapter(make_portable(adapter, base))
            _compare_functions(adapter, trained)
            _say_what_changed(as_trained, adapter.config)
    except NotPortableError as error:
        logger.warning("The adapter keeps its trained form: %s", error)
    except AdapterError as error:
        logger.error("The adapter in %s is damaged: %s", shown_as, error)
    report = check_adapter(adapter or active, base=base)
    for engine, verdict in report.verdicts.items():
        if verdict in _OUTCOMES:
            rules = ", ".join(found.rule.name for found in report.for_engine(engine))
            logger.warning(
                "%s %s (%s); `echo-trainer check %s` says why, and what helps.",
                engine,
                _OUTCOMES[verdict],
                rules,
                shown_as,
            )
    return report


_OUTCOMES = {
    Verdict.REFUSES: "refuses to load this adapter",
    Verdict.SILENTLY_WRONG: "loads this adapter without an error and answers differently from what was trained",
}


def _say_what_changed(trained: dict[str, Any], saved: dict[str, Any]) -> None:
    """One line where the portable form shows another rank or scale than the user has set."""
    names = ("r", "lora_alpha", "use_rslora")
    before, after = ([f"{name}={config.get(name)}" for name in names] for config in (trained, saved))
    changed = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
    if changed:
        logger.warning(
            "The adapter was trained with %s and is saved with %s: the same function, in the form that every engine "
            "reads. portable_adapter=False keeps the trained form.",
            ", ".join(old for old, _ in changed),
            ", ".join(new for _, new in changed),
        )


def _probe_outputs(adapter: Adapter) -> dict[str, Tensor]:
    """s B A x for every LoRA module of an adapter and a few random x, (out, PROBES), in double precision."""
    outputs, tensors = {}, adapter.values
    for path, module in adapter.modules.items():
        if set(module.keys) != {"A", "B"}:
            continue
        a, b = tensors[module.keys["A"]].double(), tensors[module.keys["B"]].double()
        probe = torch.randn(a.shape[1], PROBES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        outputs[path] = adapter.scale(module) * (b @ (a @ probe))
    return outputs


def _compare_functions(adapter: Adapter, trained: dict[str, Tensor]) -> None:
    rewritten = _probe_outputs(adapter)
    for path, expected in trained.items():
        error = (rewritten[path] - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float64).tiny)
        if not error <= TOLERANCE:
            raise OSError(
                f"The portable form of {path!r} in {adapter.folder} differs from what was trained by "
                f"{float(error):.1e} (relative). Save with portable_adapter=False and report this."
            )


def _identical(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
