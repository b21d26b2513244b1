"""Weights of the base that a library has quantised: what must not happen to them while an adapter is trained.

Not public: `support_avx512bf16_for_cpu` of bitsandbytes' `Linear4bit` (seen in 0.50 with torch 2.13). On a CPU with
AVX512-BF16 a layer that runs in evaluation mode without gradient packs its 4-bit weights in another way. That
rounds their scales for good, and a backward pass later reads the packed numbers as if they were not: gradients are
wrong by their own size, without a word. Where the attribute is gone nothing is packed that we know of.
"""

from torch import nn


def keep_4bit_weights(model: nn.Module) -> None:
    """Let no evaluation change the 4-bit weights of a model, so that steps before and after it see the same base."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False
