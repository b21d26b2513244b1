"""Is what was saved the adapter that was trained? Loaded as a user loads it, and one forward of both compared.

The base is not loaded a second time. A copy of the model is made that shares the memory of every weight, what PEFT has
put into it is taken out again, and the saved adapter is loaded onto that. Rows of the vocabulary that the base does
not have by its own config are emptied first: a user's base does not have them either.

What cannot be compared in this way is said and not compared: a base that is sharded over processes (FSDP2, ZeRO-3) or
lies partly on disk, and one that the adapter's initialisation or `layer_replication` has changed in memory.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.find_variants import changes_base
from ..adapter.folder import Adapter, AdapterError
from ..adapter.logit_error import probe_ids, with_adapter
from ..adapter.vocabulary import embedding_names, rows_of_config
from ..compat.building import forget_replaced_forwards
from ..passes.memory import is_out_of_memory

logger = logging.getLogger(__name__)

ROWS, LENGTH = 2, 16
SAFETY = 16
"""How far logits may differ, relative to their norm, in roundings per layer; each layer makes about 16 in sequence."""


class UnloadableAdapterError(AdapterError):
    """What was saved cannot be loaded or run, or computes something else than the trained model."""


def compare_reloaded(saved: dict[str, Adapter], model: Any) -> str | None:
    """
    Load the active adapters as a user does, and compare one forward with the trained model's.

    Args:
        saved: files of each active adapter, by name.
        model: the PeftModel that was trained. It is not changed, nor is any random number of the run drawn.

    Returns:
        None where both are equal; why it was not compared, in words, where that cannot be done.

    Raises:
        UnloadableAdapterError: PEFT cannot load or run what was saved, or loads something else.
    """
    if reason := _not_comparable(model):
        return reason
    ids = probe_ids(model.config, ROWS, LENGTH).to(model.device)
    try:
        with _undisturbed(model), torch.no_grad():
            try:
                trained = _logits(model.get_base_model(), ids, "The trained model")
            except UnloadableAdapterError:
                if getattr(model.config, "sub_configs", None):
                    return "the model does not run on text alone"
                raise
            loaded = _logits(_load(saved, model), ids, "The saved adapter, loaded by PEFT,")
    except Exception as error:
        if is_out_of_memory(error):
            return "there was no memory for it"
        if isinstance(error, UnloadableAdapterError) or not isinstance(error, AdapterError):
            raise
        raise UnloadableAdapterError(str(error)) from error
    if not torch.isfinite(trained).all():
        return "the trained model's logits are not finite on random tokens"
    difference = float((loaded - trained).norm() / trained.norm())
    if not difference <= _allowed(model):
        raise UnloadableAdapterError(
            f"The saved adapter, loaded by PEFT onto its base, computes something else than the trained model: logits "
            f"differ by {difference:.1e} (relative), rounding explains {_allowed(model):.1e}. Something that was "
            f"trained is not in the adapter, such as embeddings of new tokens (train them with modules_to_save or "
            f"trainable_token_indices) or weights of the base."
        )
    return None


def _not_comparable(model: Any) -> str | None:
    parameters = list(model.parameters())
    if any(hasattr(p, "ds_id") or hasattr(p, "device_mesh") for p in parameters):
        return "the base is sharded over processes"
    if any(p.is_meta for p in parameters):
        return "a part of the base is not in memory"
    for name in model.active_adapters:
        config = model.peft_config[name]
        if init := changes_base(config.to_dict()):
            return f"init_lora_weights={init!r} has changed the base in memory"
        for variant in ("layer_replication", "kasa_config"):
            if getattr(config, variant, None):
                return f"{variant} has changed the base in memory"
    return None


def _logits(model: Any, ids: Tensor, who: str) -> Tensor:
    try:
        return model(input_ids=ids, use_cache=False).logits.float()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        words = str(error).splitlines()[0].rstrip(".") if str(error) else "no reason given"
        raise UnloadableAdapterError(
            f"{who} cannot be run: its forward fails with {type(error).__name__}: {words}. So nobody could use it. "
            f"The training did not notice, since its loss does not call every module's forward."
        ) from error


def _load(saved: dict[str, Adapter], model: Any) -> Any:
    """The saved adapters on the base of the trained model, whose memory it shares."""
    first, *others = model.active_adapters
    base = _plain_base(model)
    _empty_new_rows(base)
    loaded = with_adapter(base, saved[first])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in others:
            loaded.load_adapter(saved[name].folder, name)
        if others:
            loaded.base_model.set_adapter(["default", *others])
    return loaded.eval()


def _plain_base(model: Any) -> Any:
    """The base below an adapted model as it was before, on the same memory."""
    shared: dict[int, Any] = {}
    for module in model.base_model.modules():
        for parameter in module.parameters(recurse=False):
            # Of its own, so that what PEFT sets on it stays there; a quantised one has more to it than numbers.
            own = (
                nn.Parameter(parameter.detach(), requires_grad=False) if type(parameter) is nn.Parameter else parameter
            )
            shared[id(parameter)] = own
        shared |= {id(buffer): buffer for buffer in module.buffers(recurse=False)}
        shared |= {id(state): state for name in ("quant_state", "state") if (state := vars(module).get(name))}
    copied = copy.deepcopy(model.base_model, shared)
    forget_replaced_forwards(copied)
    base = copied.unload()
    vars(base).pop("peft_config", None)
    return base


def _empty_new_rows(base: Any) -> None:
    """Empty the rows of new tokens in the copy's embeddings, as far as the base's own config tells their number."""
    rows = rows_of_config(base.config)
    emptied: dict[int, nn.Parameter] = {}
    for path in embedding_names(base):
        module = base.get_submodule(path)
        weight = module.weight
        if rows is not None and type(weight) is nn.Parameter and weight.shape[0] > rows:
            if id(weight) not in emptied:
                data = weight.detach().clone()
                data[rows:] = 0
                emptied[id(weight)] = nn.Parameter(data, requires_grad=False)
            module.weight = emptied[id(weight)]


def _allowed(model: Any) -> float:
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize > 1}
    epsilon = max(torch.finfo(kind).eps for kind in (*kinds, torch.float32))
    if model.device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32":
        epsilon = max(epsilon, 2.0**-10)
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", 1)
    return SAFETY * epsilon * depth**0.5


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """The model in evaluation mode inside; afterwards modules and random numbers are as before."""
    training = [module for module in model.modules() if module.training]
    devices = [model.device] if model.device.type == "cuda" else []
    model.eval()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module in training:
            module.training = True
