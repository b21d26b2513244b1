"""The echo networks: from the echo z of a segment to a delta for every target LoRA module (docs/method.md, step 3).

    e = P2 tanh(P1 LN(z)),   g = sigmoid(G2 tanh(G1 LN(z)) + b_g),   delta_m = lambda_m * (g * e)

Without a gate delta_m = lambda_m * e.

Shapes: G segments, S source layers, d hidden size, w bottleneck, o output size of module m.

The networks compute in their own dtype, float32, whatever the model's: they are small, and a gate near its start value
moves in steps that bfloat16 cannot hold.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .aggregation import AGGREGATIONS
from .silence import silenced
from .sites import EchoSite, site_key

Delta = dict[str, Float[Tensor, "G _"]]
"""delta_m (G, o_m) of every target module by `site_key`."""


@dataclass(frozen=True)
class NetworkForm:
    """
    What all echo networks of a run have in common.

    Attributes:
        bottleneck: w.
        aggregation: how the source layers become z, a name in `aggregation.AGGREGATIONS`.
        gate: "sigmoid" or "none".
        gate_bias: start value of b_g.
        scale: start value of lambda_m.
    """

    bottleneck: int = 64
    aggregation: str = "mean"
    gate: str = "sigmoid"
    gate_bias: float = -2.0
    scale: float = 0.1


class EchoNetwork(nn.Module):
    """
    Projection and gate of one target module m.

    Args:
        hidden_size: d.
        out_features: o.
        form: what it consists of.
        generator: of its start values.

    | parameter | symbol | shape | starts at |
    |---|---|---|---|
    | `project_in` | P1 | (w, d) | normal, 1 / sqrt(d) |
    | `project_out` | P2 | (o, w) | zero: at step 0 the echo pass equals the plain pass |
    | `gate_in` | G1 | (w, d) | normal, 1 / sqrt(d) |
    | `gate_out` | G2 | (o, w) | normal, 1 / sqrt(w) |
    | `gate_bias` | b_g | (o,) | `form.gate_bias` |
    | `scale` | lambda_m | (1,) | `form.scale` |

    Those of the gate are None without one. Only P2 starts at zero. Were P1 zero as well, every gradient of the network
    would be zero for ever.
    """

    def __init__(self, hidden_size: int, out_features: int, form: NetworkForm, generator: torch.Generator):
        super().__init__()
        gated, width = form.gate == "sigmoid", form.bottleneck
        self.project_in = _normal((width, hidden_size), generator)
        self.project_out = nn.Parameter(torch.zeros(out_features, width))
        self.gate_in = _normal((width, hidden_size), generator) if gated else None
        self.gate_out = _normal((out_features, width), generator) if gated else None
        self.gate_bias = nn.Parameter(torch.full((out_features,), form.gate_bias)) if gated else None
        self.scale = nn.Parameter(torch.full((1,), form.scale))

    def forward(self, z_Gd: Float[Tensor, "G d"]) -> tuple[Float[Tensor, "G o"], Float[Tensor, "G o"] | None]:
        """delta (G, o) and the gate g (G, o), None without one, for normalised echoes z (G, d), float32."""
        e_Go = F.linear(torch.tanh(F.linear(z_Gd, self.project_in)), self.project_out)
        if self.gate_in is None or self.gate_out is None:
            return self.scale * e_Go, None
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
        form: what each of them consists of.
        seed: seed of the initialisation. A generator of its own keeps torch's global stream untouched, so a run with
            the echo and one without share LoRA initialisation and data order.
    """

    def __init__(self, sites: list[EchoSite], n_sources: int, hidden_size: int, form: NetworkForm, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.hidden_size = hidden_size
        self.networks = nn.ModuleDict(
            {site_key(site): EchoNetwork(hidden_size, site.out_features, form, generator) for site in sites}
        )
        self.aggregation = AGGREGATIONS[form.aggregation]
        start = self.aggregation.start
        # Under this name in checkpoints, whatever the aggregation learns.
        self.source_logits = nn.Parameter(start(n_sources, hidden_size)) if start is not None else None

    def forward(
        self, states_SGd: Float[Tensor, "S G d"], weightless: bool = False
    ) -> tuple[Delta, Float[Tensor, ""] | None]:
        """
        Args:
            states_SGd: hidden states of the source layers at the boundaries, (S, G, d), with a gradient or without.
            weightless: return zeros; gradients are zero and arrive in the usual order.

        Returns:
            delta (G, o_m) of every target module by `site_key`, and the mean gate opening, a scalar without gradient;
            None without a gate.
        """
        with torch.autocast(states_SGd.device.type, enabled=False):
            z_Gd = self.aggregate(states_SGd.to(self.dtype))
            z_Gd = F.layer_norm(z_Gd, (self.hidden_size,))
            deltas, gates = {}, []
            for key, network in self.networks.items():
                delta_Go, g_Go = network(z_Gd)
                deltas[key] = silenced(delta_Go) if weightless else delta_Go
                if g_Go is not None:
                    gates.append(g_Go.detach().mean())
        return deltas, torch.stack(gates).mean() if gates else None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the networks' parameters."""
        return next(self.networks.parameters()).dtype

    def aggregate(self, states_SGd: Float[Tensor, "S G d"]) -> Float[Tensor, "G d"]:
        """z (G, d) of the source layers."""
        return self.aggregation.combine(states_SGd, self.source_logits)


def _normal(shape: tuple[int, int], generator: torch.Generator) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=generator) / math.sqrt(shape[1]))
