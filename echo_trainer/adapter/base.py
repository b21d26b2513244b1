"""The base of an adapter without its weights: names and shapes, from a model on "meta"."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from ..compat.building import empty_model
from ..compat.identity import name_of
from .folder import Adapter, AdapterError
from .peft_load import PeftLoad, load_without_weights
from .vocabulary import embedding_names


@dataclass(frozen=True)
class Base:
    """
    What the rules need of the base model.

    Attributes:
        name: folder, Hub id or class.
        model_type: of its config.
        shapes: (out, in) of every linear layer and embedding, by name.
        tied: whether head and embedding share a weight.
        towers: names of the linear layers that are no part of the language model: vision tower, connector.
        unbiased: names of the linear layers without a bias.
        embeddings: names of the input and output embeddings.
        rows: of the input embedding.
        build: makes the model anew on "meta"; None where that cannot be done.
        loaded: what PEFT makes of the adapter in question on this base; None where it was not asked.
    """

    name: str
    model_type: str
    shapes: dict[str, tuple[int, int]]
    tied: bool
    towers: frozenset[str] = frozenset()
    unbiased: frozenset[str] = frozenset()
    embeddings: tuple[str, ...] = ()
    rows: int = 0
    build: Callable[[], Any] | None = None
    loaded: PeftLoad | None = None

    def layers(self, stack: str, kind: str) -> dict[str, tuple[int, int]]:
        """The modules named ``kind`` in the numbered layers of ``stack``, in order."""
        inside = re.compile(rf"{re.escape(stack)}\.\d+\.(.*\.)?{re.escape(kind)}$")
        return {path: shape for path, shape in self.shapes.items() if inside.match(path)}

    def asked_about(self, adapter: Adapter) -> Base:
        """This base with what PEFT makes of ``adapter`` on it."""
        loaded = None if self.build is None else load_without_weights(adapter, self.build)
        return replace(self, loaded=loaded)


def read_base(base: Any, download: bool = False) -> Base:
    """The shapes of a base model, without its weights.

    Args:
        base: a model (also a PeftModel), its config, a folder with ``config.json``, or a name on the Hub; or what this
            returned before. All but a model are built on "meta", which is nothing to do beside a training.
        download: whether ``config.json`` may be fetched from the Hub when it is not in the local cache.

    Raises:
        AdapterError: the config is not found, or this transformers does not know the architecture.

    """
    if isinstance(base, Base):
        return base
    if isinstance(base, torch.nn.Module):
        adapted: Any = base  # torch types every attribute of a module as one of its tensors or modules
        model = adapted.get_base_model() if hasattr(base, "get_base_model") else adapted
        return _read(model, name_of(model.config) or type(model).__name__, _rebuild(model))
    name = name_of(base) or type(base).__name__
    if isinstance(base, str | Path):
        name = str(base)
        try:
            base = transformers.AutoConfig.from_pretrained(name, local_files_only=not download)
        except (OSError, ValueError, KeyError) as error:
            raise AdapterError(
                f"The config of the base model '{name}' cannot be read ({str(error).splitlines()[0]}). Give a folder "
                f"with a config.json, or a name on the Hub that is reachable or already in the local cache."
            ) from error
    try:
        model = empty_model(base)
    except ValueError as error:
        raise AdapterError(f"'{name}' is no causal language model that this transformers knows: {error}") from error
    return _read(model, name, partial(empty_model, base))


def _rebuild(model: Any) -> Callable[[], Any] | None:
    """How a loaded model is built anew; None where an adapter has changed the number of its layers."""
    configs = getattr(model, "peft_config", {}).values()
    if any(getattr(config, "layer_replication", None) for config in configs):
        return None
    return partial(empty_model, model.config, type(model))


def _read(model: Any, name: str, build: Callable[[], Any] | None) -> Base:
    shapes, unbiased = {}, set()
    for path, module in model.named_modules():
        if "lora_" in path or path.endswith(".base_layer"):
            continue
        if getattr(getattr(module, "base_layer", module), "bias", 0) is None:
            unbiased.add(path)
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            shapes[path] = (module.out_features, module.in_features)
        elif hasattr(module, "nf") and hasattr(module, "nx"):  # transformers' Conv1D
            shapes[path] = (module.nf, module.nx)
        elif hasattr(module, "num_embeddings"):
            shapes[path] = (module.embedding_dim, module.num_embeddings)
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    model_type = getattr(model.config, "model_type", "")
    towers, embeddings = _towers(model, shapes), embedding_names(model)
    rows = getattr(model.get_input_embeddings(), "num_embeddings", 0)
    return Base(name, model_type, shapes, tied, towers, frozenset(unbiased), embeddings, rows, build)


def _towers(model: Any, paths: dict[str, Any]) -> frozenset[str]:
    if not getattr(model.config, "sub_configs", None) or not hasattr(model, "get_decoder"):
        return frozenset()
    language = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    inside = [
        f"{name}." for name, module in model.named_modules() if name and any(module is part for part in language)
    ]
    if not inside:
        return frozenset()
    return frozenset(path for path in paths if not f"{path}.".startswith(tuple(inside)))
