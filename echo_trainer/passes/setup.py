"""The parts of a model that take part in the echo."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from ..compat.cache import CachePlace
from ..method.network import EchoNetworks, NetworkForm
from ..method.sites import EchoSite
from .layers import backbone, decoder_layers


@dataclass
class EchoSetup:
    """
    The parts of a model that take part in the echo.

    Attributes:
        model: the causal language model below the PeftModel.
        networks: the echo networks.
        sites: target modules.
        source_layers: S, indices from 0.
        detach: whether z is taken without its graph.
        layers_path: path of the decoder layers in the model, where they cannot be found.
        cache: where the model takes a cache; found by the proof at the first step, None where it takes none.
        unneeded: modules of a layer that its keys and values do not depend on, likewise; None where not tried.
        built_from: the options that the parts were chosen by.
    """

    model: PreTrainedModel
    networks: EchoNetworks
    sites: list[EchoSite]
    source_layers: list[int]
    detach: bool = True
    layers_path: str | None = None
    cache: CachePlace | None = None
    unneeded: list[str] | None = None
    built_from: tuple = ()

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers; looked up anew, since engines replace modules."""
        return decoder_layers(self.model, self.layers_path)

    @property
    def backbone(self) -> nn.Module:
        """The part of the model below its head."""
        return backbone(self.model, self.layers)

    @property
    def first_target(self) -> int:
        """Index of the lowest target layer; below it both passes are the same."""
        return min(site.layer for site in self.sites)


def plain_setup(model: PreTrainedModel) -> EchoSetup:
    """What a pass needs of a model without an echo."""
    # A step without an echo pass still touches the networks' parameters, so there has to be one.
    networks = EchoNetworks([], 1, 1, NetworkForm(bottleneck=1, aggregation="weighted"), seed=0)
    return EchoSetup(model, networks.to(next(model.parameters()).device), [], [])
