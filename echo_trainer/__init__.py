"""
echo_trainer: `EchoSFTTrainer`, a drop-in replacement for `trl.SFTTrainer` that implements Echo-LoRA.

One training step, top to bottom; the file of each stage in brackets:

    first step ──> is the echo pass exact here?       [passes.proof, passes.rounding, run.pass_choice]
    labels ──> answer segments, boundaries b_i        [method.segments, run.collate in the loader's workers]
    step k ──> routes r_i ~ Bernoulli(p_k)            [method.routing, run.draft, run.batches]
           ──> the indices of the step                [method.plan, method.forms, method.layouts]
    plain pass: CE_plain, deep states h at b_i        [passes.plain, passes.layers]
      z_i = mean over s in S of stopgrad(h_i^(s)[b_i])  [method.aggregation]
      delta_m = lambda_m (g * e)                      [method.network]
    echo pass, routed samples: module m + delta_m     [passes.echo: a table of passes.suffix, passes.full]
    L = 1/N sum_i [CE_plain + r_i (CE_echo + lambda_kd KD)]   [method.losses, passes.head]
    all of it one forward of the wrapped model        [passes.step, trainer]
    does the echo know more? on held-out rows         [method.advantage, passes.score, run.held_out, run.probation]
    backward, guarded against NaN                     [run.guard]
    checkpoints, whole or not at all                  [run.checkpoints, run.checkpoint_files, run.resume]
    the final adapter, its card, its way to the Hub   [run.save, adapter, report, run.pushes, hub]
    prompts without answers, answered by the echo     [labelling]

A second trainer, for a verifier in place of answers: rank-aware beam GRPO on `trl.GRPOTrainer` [bgrpo].

Around it, each a package whose docstring names its files: [selection] of layers by CKA, [recipe], [evaluation],
[export], [ablation], [bench], [quickstart], and the commands in [cli]. Imports go one way: method < compat < passes <
adapter < report < hub < selection < run < evaluation < labelling < trainer < recipe < export < ablation, bench,
bgrpo < quickstart < cli.
What is not public of other libraries is used in [compat] alone.

Symbols: S source layers, M target layers, m a LoRA module of a target layer with output size o_m, d hidden size,
b_i last prompt token of segment i, z echo vector, e projection, g gate, lambda_m scale, tau distillation temperature,
lambda_kd distillation weight, p_k routing probability at optimizer step k of K, N answer tokens of the global batch.
Equations, invariants and why the suffix pass is exact: docs/method.md. Paper: arXiv 2605.08177.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .adapter.check import check_adapter
    from .adapter.folder import AdapterError
    from .bgrpo.config import BeamGRPOConfig
    from .bgrpo.trainer import BeamGRPOTrainer
    from .config import EchoSFTConfig
    from .evaluation.adapter import evaluate_adapter
    from .export.adapter import export_adapter
    from .hub.push import push_adapter
    from .labelling.options import DistillOptions
    from .run.collate import EchoCollator
    from .selection.select import select_layers
    from .trainer import EchoSFTTrainer

# Loaded on first use: importing the package itself must not import torch.
_LAZY = {
    "AdapterError": "adapter.folder",
    "BeamGRPOConfig": "bgrpo.config",
    "BeamGRPOTrainer": "bgrpo.trainer",
    "DistillOptions": "labelling.options",
    "EchoCollator": "run.collate",
    "EchoSFTConfig": "config",
    "EchoSFTTrainer": "trainer",
    "check_adapter": "adapter.check",
    "evaluate_adapter": "evaluation.adapter",
    "export_adapter": "export.adapter",
    "push_adapter": "hub.push",
    "select_layers": "selection.select",
}

__all__ = [
    "AdapterError",
    "BeamGRPOConfig",
    "BeamGRPOTrainer",
    "DistillOptions",
    "EchoCollator",
    "EchoSFTConfig",
    "EchoSFTTrainer",
    "__version__",
    "check_adapter",
    "evaluate_adapter",
    "export_adapter",
    "push_adapter",
    "select_layers",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
