"""Find the decoder layers of a model, what runs them, and the LoRA modules inside them."""

from typing import Any

from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import LoraLayer
from torch import nn

from ..compat.peft import wraps_a_parameter
from ..method.sites import EchoSite
from .modules import base_model_of


def decoder_layers(model: nn.Module, path: str | None = None) -> nn.ModuleList:
    """`layer_list` of a model that is to be trained with an echo."""
    return layer_list(model, path)


def layer_list(model: nn.Module, path: str | None = None, option: str = "echo_layers") -> nn.ModuleList:
    """
    The layers of a language model (of the language part, for a model of several modalities), in order.

    Args:
        model: a `PreTrainedModel`, or a `PeftModel` around one.
        path: dotted name of their `nn.ModuleList` in the model, where they cannot be found.
        option: what the caller's user names `path` with, for errors.

    Raises:
        ValueError: the model is an encoder-decoder, or no list of layers can be found.
    """
    model = base_model_of(model)
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder model. One stack of layers is needed, which reads prompt "
            f"and answer as one sequence; use a decoder-only model (Llama, Qwen, Mistral, GPT-2 ...)."
        )
    if path is not None:
        found = dict(model.named_modules()).get(path)
        if not isinstance(found, nn.ModuleList):
            raise ValueError(f"`{option}` is {path!r}, and {_no_such_layers(model, option)}")
        return found
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for module in (decoder, *decoder.modules()):
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(
        f"No list of {depth} layers was found, so it is not known which modules are the layers of the model: "
        f"{_no_such_layers(model, option)}"
    )


def backbone(model: nn.Module, layers: nn.ModuleList) -> nn.Module:
    """
    The part of a causal language model that turns tokens into final hidden states: its child that holds the layers.

    Not `model.base_model`, which is the model itself where a family (Llama 4) names its backbone otherwise.
    """
    for child in model.children():
        if any(module is layers for module in child.modules()):
            return child
    raise ValueError(
        f"The decoder layers of {type(model).__name__} hang at the model itself and not at a backbone below its head, "
        f"so its hidden states cannot be had without its logits. Echo-LoRA cannot train it."
    )


def _no_such_layers(model: nn.Module, option: str) -> str:
    lists = [f"{name} ({len(m)})" for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    return (
        f"{type(model).__name__} has these lists of modules: {', '.join(lists) or 'none'}. Name that of the layers in "
        f"`{option}`, such as 'model.layers'."
    )


def lora_sites(layer: nn.Module, index: int, hidden_size: int) -> list[EchoSite]:
    """
    The LoRA modules of one decoder layer that can receive an echo, in the order of the layer.

    Embeddings and fused expert parameters are left out: the first have no answer output to add to, the second see
    tokens in an order that is not the sequence's. Where a layer has adapters on parameters alone
    (`target_parameters`), the module that holds them, such as the whole mixture of experts, receives the echo on what
    it returns.

    Args:
        layer: a decoder layer.
        index: of the layer.
        hidden_size: d, size of what a mixture of experts returns.
    """
    adapters: list[tuple[str, Any]] = [found for found in layer.named_modules() if _is_active(found[1])]
    sites = [
        EchoSite(name, index, module, module.out_features)
        for name, module in adapters
        if not isinstance(module, LoraEmbedding) and not wraps_a_parameter(module) and "experts" not in name.split(".")
    ]
    return sites or [
        EchoSite(name, index, module, getattr(module.get_base_layer(), "out_features", hidden_size))
        for name, module in adapters
        if wraps_a_parameter(module) and not name.endswith(".base_layer")  # around another one
    ]


def _is_active(module: nn.Module) -> bool:
    return isinstance(module, LoraLayer) and any(adapter in module.lora_A for adapter in module.active_adapters)


def adapted_layers(model: nn.Module, path: str | None = None) -> list[int]:
    """Indices of the layers that hold a LoRA module which can receive an echo; arguments as for `decoder_layers`."""
    size, layers = _hidden_size(model), decoder_layers(model, path)
    return [index for index, layer in enumerate(layers) if lora_sites(layer, index, size)]


def find_sites(model: nn.Module, target_layers: list[int], path: str | None = None) -> list[EchoSite]:
    """
    All LoRA modules of the target layers.

    Args:
        model: as for `decoder_layers`, and `path` as well.
        target_layers: M, indices from 0.

    Raises:
        ValueError: a target layer has no LoRA module.
    """
    layers = decoder_layers(model, path)
    adapted = adapted_layers(model, path)
    empty = [index for index in target_layers if index not in adapted]
    if empty:
        raise ValueError(
            f"Target layers {empty} hold no LoRA module, so there is nothing to add an echo to (layers with LoRA: "
            f"{adapted or 'none'}). Name other layers in `echo_target_layers`, or let LoRA adapt these: check "
            f"`layers_to_transform` and `target_modules` of the LoraConfig."
        )
    size = _hidden_size(model)
    return [site for index in target_layers for site in lora_sites(layers[index], index, size)]


def _hidden_size(model: nn.Module) -> int:
    return base_model_of(model).config.get_text_config().hidden_size
