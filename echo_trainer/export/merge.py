"""Merging an adapter into its base, where weights that share memory, biases and the depth need more than PEFT does."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..adapter.refuse import ExportError, shorten


def merge(model: Any) -> Any:
    """
    The base with the adapter's changes in its weights, as an ordinary model.

    Args:
        model: a PEFT model with float32 weights; it is used up.

    Raises:
        ExportError: PEFT cannot merge this method, or a trained bias has no place in the base.
    """
    _refuse_biases(model)
    base = model.get_base_model()
    replication = getattr(model.peft_config[model.active_adapter], "layer_replication", None)
    if replication:
        _own_weights(base)
        _deepen(base.config, replication)
    _untie_trained(base)
    try:
        merged = model.merge_and_unload()
    except (NotImplementedError, ValueError, RuntimeError, AttributeError) as error:
        kind = str(getattr(model.peft_config[model.active_adapter], "peft_type", "")).rpartition(".")[2]
        raise ExportError(f"PEFT cannot merge this {kind} adapter: {str(error).splitlines()[0].rstrip('.')}. Serve it "
                          f"with transformers and PEFT, which load it as it is.") from error  # fmt: skip
    head, embedding = merged.get_output_embeddings(), merged.get_input_embeddings()
    if None not in (head, embedding) and head.weight is not embedding.weight:
        _say_untied(merged.config)
    return merged


def cast_weights(model: Any, dtype: torch.dtype) -> None:
    """Like ``model.to(dtype)``, except for rotary frequencies and other buffers that are computed, not saved."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def _refuse_biases(model: Any) -> None:
    """Stop at biases of lora_B on layers without a bias: no model of this class has a place for them."""
    nowhere = [
        name
        for name, module in model.named_modules()
        if any(getattr(module, "lora_bias", {}).values()) and getattr(module.get_base_layer(), "bias", None) is None
    ]
    if nowhere:
        raise ExportError(f"lora_bias trained biases on layers of the base that have none, so they cannot be merged: "
                          f"{shorten(nowhere)}. Serve it with transformers and PEFT, which load it as it is, or train "
                          f"it again with lora_bias=False.")  # fmt: skip


def _own_weights(base: Any) -> None:
    """Give each module weights of its own: replicated layers share them, and each has a LoRA of its own."""
    seen: set[int] = set()
    head = base.get_output_embeddings()
    for module in base.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen and module is not head:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
            seen.add(id(parameter))


def _deepen(config: Any, replication: list[list[int]]) -> None:
    """Write the deeper model's layers into the config where it lists them; PEFT has written their number."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    if kinds and len(kinds) < text.num_hidden_layers:
        text.layer_types = [kinds[layer] for start, end in replication for layer in range(start, end)]
    elif kinds:
        text.layer_types = kinds[: text.num_hidden_layers]  # as PEFT runs it


def _untie_trained(base: Any) -> None:
    """Give head and embedding a weight each where they share one and a LoRA on either would change both."""
    ends = [base.get_output_embeddings(), base.get_input_embeddings()]
    if None in ends or not any(hasattr(end, "lora_A") for end in ends):
        return
    head, embedding = (getattr(end, "base_layer", end) for end in ends)
    if head.weight is embedding.weight:
        head.weight = type(head.weight)(head.weight.detach().clone(), requires_grad=False)
        _say_untied(base.config)


def _say_untied(config: Any) -> None:
    config.get_text_config().tie_word_embeddings = False
    config.tie_word_embeddings = False
