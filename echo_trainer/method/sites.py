"""Where the echo goes: the LoRA modules of the target layers."""

from dataclasses import dataclass

from torch import nn


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


def site_key(site: EchoSite) -> str:
    """Name of a site's network: no dots (a module name has none) and no "lora_" (PEFT saves what has it)."""
    return f"layer{site.layer}_{site.name.replace('.', '_')}"
