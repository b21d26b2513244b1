"""Find the decoder layers of a model and the LoRA modules inside them; choose source and target layers by depth."""

from dataclasses import dataclass

from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import LoraLayer
from torch import nn

from .compat.peft import wraps_a_parameter

# Share of the depth at which a 32-layer model has its source layers 24..27 and its target layers 4..7.
SOURCE_DEPTHS = (24 / 32, 28 / 32)
TARGET_DEPTHS = (4 / 32, 8 / 32)


@dataclass(frozen=True)
class EchoSite:
    """
    A LoRA module that receives the echo.

    Attributes:
        name: path of the module inside its decoder layer, such as "self_attn.q_proj".
        layer: index of the decoder layer.
        module: the `LoraLayer`.
        out_features: o_m, size of its output.
    """

    name: str
    layer: int
    module: nn.Module
    out_features: int


def decoder_layers(model: nn.Module, path: str | None = None) -> nn.ModuleList:
    """
    The decoder layers of a causal language model (of the language part, for a vision-language model).

    Args:
        model: a `PreTrainedModel`, or a `PeftModel` around one.
        path: dotted name of their `nn.ModuleList` in the model, where they cannot be found.

    Raises:
        ValueError: the model is an encoder-decoder, or no list of decoder layers can be found.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder model. Echo-LoRA needs one causal decoder that reads the "
            f"prompt and the answer as one sequence; use a decoder-only model (Llama, Qwen, Mistral, GPT-2 ...)."
        )
    if path is not None:
        found = dict(model.named_modules()).get(path)
        if not isinstance(found, nn.ModuleList):
            raise ValueError(f"`echo_layers` is {path!r}, and {_no_such_layers(model)}")
        return found
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for module in (decoder, *decoder.modules()):
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(
        f"No list of {depth} decoder layers was found, so Echo-LoRA does not know where to read and add the echo: "
        f"{_no_such_layers(model)}"
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


def _no_such_layers(model: nn.Module) -> str:
    lists = [f"{name} ({len(m)})" for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    return (
        f"{type(model).__name__} has these lists of modules: {', '.join(lists) or 'none'}. Name that of the decoder "
        f"layers in `echo_layers`, such as 'model.layers'."
    )


def lora_sites(layer: nn.Module, index: int) -> list[EchoSite]:
    """
    The LoRA modules of one decoder layer that can receive an echo, in the order of the layer.

    Embeddings and fused expert parameters are left out: the first have no answer output to add to, the second see
    tokens in an order that is not the sequence's.
    """
    return [
        EchoSite(name, index, module, module.out_features)
        for name, module in layer.named_modules()
        if isinstance(module, LoraLayer)
        and not isinstance(module, LoraEmbedding)
        and not wraps_a_parameter(module)
        and "experts" not in name.split(".")
        and any(adapter in module.lora_A for adapter in module.active_adapters)
    ]


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
    adapted = [index for index, layer in enumerate(layers) if lora_sites(layer, index)]
    empty = [index for index in target_layers if index not in adapted]
    if empty:
        raise ValueError(
            f"Target layers {empty} hold no LoRA module, so there is nothing to add an echo to (layers with LoRA: "
            f"{adapted or 'none'}). Name other layers in `echo_target_layers`, or let LoRA adapt these: check "
            f"`layers_to_transform` and `target_modules` of the LoraConfig."
        )
    return [site for index in target_layers for site in lora_sites(layers[index], index)]


def default_source_layers(depth: int) -> list[int]:
    """Source layers S at about 0.75 to 0.88 of the depth; 24..27 of 32."""
    return _by_depth(depth, SOURCE_DEPTHS)


def default_target_layers(depth: int) -> list[int]:
    """Target layers M at about 0.13 to 0.25 of the depth; 4..7 of 32."""
    return _by_depth(depth, TARGET_DEPTHS)


def resolve_layers(sources: list[int] | None, targets: list[int] | None, depth: int) -> tuple[list[int], list[int]]:
    """
    Source and target layers as sorted indices from 0.

    Args:
        sources, targets: as given in the config; None chooses by depth, negative indices count from the end.
        depth: number L of decoder layers.

    Raises:
        ValueError: an index lies outside the model, or a target is not below every source.
    """
    if depth < 2:
        raise ValueError(
            f"The model has {depth} decoder layer. Echo-LoRA carries states from a deep layer to a shallower one, so "
            f"it needs at least 2."
        )
    source = _absolute("echo_source_layers", sources, depth) if sources is not None else default_source_layers(depth)
    target = _absolute("echo_target_layers", targets, depth) if targets is not None else default_target_layers(depth)
    if max(target) >= min(source):
        raise ValueError(
            f"Every target layer must lie below every source layer, and {max(target)} (target) is not below "
            f"{min(source)} (source): echo_source_layers={source}, echo_target_layers={target} of {depth} layers. "
            f"The echo goes from deep to shallow: by default sources {default_source_layers(depth)}, targets "
            f"{default_target_layers(depth)}."
        )
    return source, target


def _by_depth(depth: int, share: tuple[float, float]) -> list[int]:
    start = min(int(share[0] * depth + 0.5), depth - 1)
    end = max(int(share[1] * depth + 0.5), start + 1)
    return list(range(start, min(end, depth)))


def _absolute(name: str, indices: list[int], depth: int) -> list[int]:
    outside = [index for index in indices if not -depth <= index < depth]
    if outside:
        raise ValueError(
            f"`{name}` names {outside}, outside the model: it has {depth} decoder layers, 0 to {depth - 1} "
            f"(or -{depth} to -1, counted from the end)."
        )
    resolved = sorted({index % depth for index in indices})
    if len(resolved) != len(indices):
        raise ValueError(f"`{name}` = {indices} names the same layer twice in a model of {depth} layers.")
    return resolved
