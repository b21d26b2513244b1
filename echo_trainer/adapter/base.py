"""The base of an adapter without its weights: names and shapes, from a model on "meta"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from ..compat.building import empty_model
from ..compat.identity import name_of
from .folder import AdapterError


@dataclass(frozen=True)
class Base:
    """What the rules need of the base model: (out, in) of every linear layer and embedding, by name."""

    name: str
    model_type: str
    shapes: dict[str, tuple[int, int]]
    tied: bool

    def layers(self, stack: str, kind: str) -> dict[str, tuple[int, int]]:
        """The modules named ``kind`` in the numbered layers of ``stack``, in order."""
        inside = re.compile(rf"{re.escape(stack)}\.\d+\.(.*\.)?{re.escape(kind)}$")
        return {path: shape for path, shape in self.shapes.items() if inside.match(path)}


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
        return _shapes_of(model, name_of(model.config) or type(model).__name__)
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
    return _shapes_of(model, name)


def _shapes_of(model: Any, name: str) -> Base:
    shapes = {}
    for path, module in model.named_modules():
        if "lora_" in path or path.endswith(".base_layer"):
            continue
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            shapes[path] = (module.out_features, module.in_features)
        elif hasattr(module, "nf") and hasattr(module, "nx"):  # transformers' Conv1D
            shapes[path] = (module.nf, module.nx)
        elif hasattr(module, "num_embeddings"):
            shapes[path] = (module.embedding_dim, module.num_embeddings)
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    return Base(name, getattr(model.config, "model_type", ""), shapes, tied)
