"""The echo networks: from the echo z of a segment to a delta for every target LoRA module (docs/method.md, step 3).

    e = P2 tanh(P1 LN(z)),   g = sigmoid(G2 tanh(G1 LN(z)) + b_g),   delta_m = lambda_m * (g * e)

Shapes: G segments, S source layers, d hidden size, w bottleneck, o output size of module m.

The networks compute in their own dtype, float32, whatever the model's: they are small, and a gate near its start value
moves in steps that bfloat16 cannot hold.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .silence import silenced
from .sites import EchoSite, site_key

GATE_BIAS = -2.0
SCALE = 0.1


class EchoNetwork(nn.Module):
    """
    Projection and gate of one target module m.

    | parameter | symbol | shape | starts at |
    |---|---|---|---|
    | `project_in` | P1 | (w, d) | normal, 1 / sqrt(d) |
    | `project_out` | P2 | (o, w) | zero: at step 0 the echo pass equals the plain pass |
    | `gate_in` | G1 | (w, d) | normal, 1 / sqrt(d) |
    | `gate_out` | G2 | (o, w) | normal, 1 / sqrt(w) |
    | `gate_bias` | b_g | (o,) | -2 |
    | `scale` | lambda_m | (1,) | 0.1 |

    Only P2 starts at zero. Were P1 zero as well, every gradient of the network would be zero for ever.
    """

    def __init__(self, hidden_size: int, bottleneck: int, out_features: int, generator: torch.Generator):
        super().__init__()
        self.project_in = _normal((bottleneck, hidden_size), generator)
        self.project_out = nn.Parameter(torch.zeros(out_features, bottleneck))
        self.gate_in = _normal((bottleneck, hidden_size), generator)
        self.gate_out = _normal((out_features, bottleneck), generator)
        self.gate_bias = nn.Parameter(torch.full((out_features,), GATE_BIAS))
        self.scale = nn.Parameter(torch.full((1,), SCALE))

    def forward(self, z_Gd: Tensor) -> tuple[Tensor, Tensor]:
        """delta (G, o) and the gate g (G, o) for normalised echoes z (G, d), float32."""
        e_Go = F.linear(torch.tanh(F.linear(z_Gd, self.project_in)), self.project_out)
        g_Go = torch.sigmoid(F.linear(torch.tanh(F.linear(z_Gd, self.gate_in)), self.gate_out, self.gate_bias))
        return self.scale * (g_Go * e_Go), g_Go


class EchoNetworks(nn.Module):
    """
    One [`EchoNetwork`] per target module, and the aggregation of source layers into the echo z.

    They hang at the root of the PeftModel: there the optimizer and every distributed engine find them, and PEFT does
    not save them.

    Args:
        sites: the target modules.
        n_sources: number of source layers.
        hidden_size: d.
        bottleneck: w.
        aggregation: "mean", or "weighted" (a learned softmax over the source layers that starts as the mean).
        seed: seed of the initialisation. A generator of its own keeps torch's global stream untouched, so a run with
            the echo and one without share LoRA initialisation and data order.
    """

    def __init__(
        self, sites: list[EchoSite], n_sources: int, hidden_size: int, bottleneck: int, aggregation: str, seed: int
    ):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.hidden_size = hidden_size
        self.networks = nn.ModuleDict(
            {site_key(site): EchoNetwork(hidden_size, bottleneck, site.out_features, generator) for site in sites}
        )
        self.source_logits = nn.Parameter(torch.zeros(n_sources)) if aggregation == "weighted" else None

    def forward(self, states_SGd: Tensor, weightless: bool = False) -> tuple[dict[str, Tensor], Tensor]:
        """
        Args:
            states_SGd: hidden states of the source layers at the boundaries, without gradient, (S, G, d).
            weightless: return zeros; gradients are zero and arrive in the usual order.

        Returns:
            delta (G, o_m) of every target module by `site_key`, and the mean gate opening, a scalar without gradient.
        """
        with torch.autocast(states_SGd.device.type, enabled=False):
            z_Gd = self.aggregate(states_SGd.detach().to(self.dtype))
            z_Gd = F.layer_norm(z_Gd, (self.hidden_size,))
            outputs = {}
            for key, network in self.networks.items():
                delta_Go, g_Go = network(z_Gd)
                outputs[key] = (silenced(delta_Go) if weightless else delta_Go, g_Go)
            gate = torch.stack([g.detach().mean() for _, g in outputs.values()]).mean()
        return {key: delta for key, (delta, _) in outputs.items()}, gate

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the networks' parameters."""
        return next(self.networks.parameters()).dtype

    def aggregate(self, states_SGd: Tensor) -> Tensor:
        """z (G, d): mean over the source layers, or their softmax-weighted sum."""
        if self.source_logits is None:
            return states_SGd.mean(dim=0)
        return torch.einsum("s,sgd->gd", self.source_logits.softmax(dim=0), states_SGd)


def _normal(shape: tuple[int, int], generator: torch.Generator) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=generator) / math.sqrt(shape[1]))
