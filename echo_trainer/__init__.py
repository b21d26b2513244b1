"""
echo_trainer: `EchoSFTTrainer`, a drop-in replacement for `trl.SFTTrainer` that implements Echo-LoRA.

One training step, top to bottom; the file of each stage in brackets:

    first step ──> is the echo pass exact here?       [proof, rounding, pass_choice]
    labels ──> answer segments, boundaries b_i        [segments]
    step k ──> routes r_i ~ Bernoulli(p_k)            [routing, collator]
           ──> the indices of the step                [plan]
    plain pass: CE_plain, deep states h at b_i        [passes, layers]
      z_i = mean over s in S of stopgrad(h_i^(s)[b_i])
      delta_m = lambda_m (g * e)                      [network]
    echo pass, routed samples: module m + delta_m     [passes, injection, compat.cache]
    L = 1/N sum_i [CE_plain + r_i (CE_echo + lambda_kd KD)]   [losses, head]
    all of it one forward of the wrapped model        [step, trainer]
    backward, guarded against NaN                     [guard]
    checkpoints, whole or not at all                  [checkpoint, checkpoint_files, resume]
    the final adapter, its card, its way to the Hub   [final_save, serving, card, hub]

Around it, each a package whose docstring names its files: [selection] of layers by CKA, [evaluation], [ablation],
[serving] (what engines do with an adapter), [card], [hub], [bench], [quickstart], and the commands in [cli]. What is
not public of other libraries is used in [compat] alone.

Symbols: S source layers, M target layers, m a LoRA module of a target layer with output size o_m, d hidden size,
b_i last prompt token of segment i, z echo vector, e projection, g gate, lambda_m scale, tau distillation temperature,
lambda_kd distillation weight, p_k routing probability at optimizer step k of K, N answer tokens of the global batch.
Paper: arXiv 2605.08177.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .config import EchoSFTConfig
    from .run.collate import EchoCollator
    from .trainer import EchoSFTTrainer

# Loaded on first use: importing the package itself must not import torch.
_LAZY = {"EchoCollator": "run.collate", "EchoSFTConfig": "config", "EchoSFTTrainer": "trainer"}

__all__ = ["EchoCollator", "EchoSFTConfig", "EchoSFTTrainer", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
