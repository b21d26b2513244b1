"""The sizes of a model that the price of a pass hangs on."""

import torch
from torch import nn

from ..compat.attention import is_varlen
from ..method.costs import ModelShape
from .setup import EchoSetup


def model_shape(setup: EchoSetup, checkpointing: bool, dtype: torch.dtype | None = None) -> ModelShape:
    """
    The sizes of a model, before an engine shards it.

    Args:
        setup: the model and its echo parts.
        checkpointing: whether its layers are computed again in backward.
        dtype: of its activations, where autocast chooses another than the weights'.
    """
    config, layers = setup.model.config.get_text_config(), setup.layers
    heads = getattr(config, "num_attention_heads", None) or 1
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    maps = [shape for layer in layers for shape in _linear_maps(layer)]
    return ModelShape(
        layers=len(layers),
        first_target=setup.first_target,
        hidden=config.hidden_size,
        weights=sum(a * b for a, b in maps) / len(layers),
        activations=sum(a + b for a, b in maps) / len(layers),
        queries=heads * size,
        key_values=2 * (getattr(config, "num_key_value_heads", None) or heads) * size,
        itemsize=(dtype or _activations(setup.model)).itemsize,
        checkpointing=checkpointing,
        varlen=is_varlen(setup.model.config),
    )


def _linear_maps(layer: nn.Module) -> list[tuple[int, int]]:
    """Inputs and outputs of the linear maps of a layer, without those of adapters."""
    found = []
    for name, module in layer.named_modules():
        if "lora_" in name or list(module.children()):
            continue
        weight = getattr(module, "weight", None)
        if hasattr(module, "in_features") and hasattr(module, "out_features"):  # a quantised weight has another shape
            found.append((module.in_features, module.out_features))
        elif weight is not None and weight.dim() == 2:
            found.append((weight.shape[0], weight.shape[1]))
    return found


def _activations(model: nn.Module) -> torch.dtype:
    """The dtype that a model computes in."""
    dtype = getattr(model, "dtype", torch.float32)
    return dtype if dtype.is_floating_point else torch.float32
