"""The language-model head as a function of hidden states, for only the positions that are asked for.

Never (B, T, vocab): a step projects the positions that predict answer tokens, a chunk at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .modules import forward_replaced

T = TypeVar("T")


@dataclass(frozen=True)
class LanguageModelHead:
    """
    logits = softcap(scale * (W h + b)), the last step of a causal language model.

    Attributes:
        weight: W (V, d).
        bias: b (V,) or None.
        scale: factor before soft-capping (Cohere, Granite, Falcon-H1 ...), 1 for most models.
        softcap: c of c * tanh(x / c) (Gemma2), None for most models.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    def logits(self, hidden_Nd: Tensor) -> Tensor:
        """Logits (N, V), at least float32, for hidden states (N, d)."""
        logits_NV = F.linear(hidden_Nd, self.weight, self.bias)
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
        return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))


def with_head(model: nn.Module, use: Callable[[LanguageModelHead], T]) -> T:
    """
    What `use` returns for the head of a causal language model of transformers.

    It is called inside a call of the head module, where an engine that shards parameters has gathered the head's.
    """
    module = model.get_output_embeddings()  # looked up anew, since PEFT and FSDP replace modules
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    result: list[T] = []

    def forward() -> None:
        # Not returned: an engine with mixed precision would cast it.
        head = LanguageModelHead(module.weight, getattr(module, "bias", None), _logit_scale(config), softcap)
        result.append(use(head))

    with forward_replaced(module, forward):
        module()
    return result[0]


def _logit_scale(config) -> float:
    """Factor on the logits. The names differ between model families; this list follows transformers 5.23."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is not None:
        return float(scaling) if config.model_type == "hyperclovax" else 1.0 / scaling
    return 1.0
