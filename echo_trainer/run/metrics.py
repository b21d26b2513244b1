"""Metrics of the echo, summed on the device and read only when they are logged.

A `.item()` a step makes the host wait for the device. So a step only adds to tensors; `drain` reduces them over the
processes and reads them in one go.
"""

from typing import Any

import torch
from torch import Tensor

from ..method.plan import EchoPlan

SUMS = ("objective", "ce_plain", "entropy", "correct", "ce_plain_routed", "ce_echo", "kd", "agreement")
MEANS = ("gate", "relative_delta", "aux_loss")
COUNTS: tuple[str, ...] = (
    "tokens", "routed_tokens", "input_tokens", "samples", "routed", "unroutable", "echo_passes", "passes", "p",
    "nonfinite",
)  # fmt: skip
_COLUMNS: tuple[str, ...] = (*SUMS, *MEANS, *COUNTS)


class EchoMetrics:
    """Sums since the last log."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._device_sums: Tensor | None = None
        self._counts = dict.fromkeys(COUNTS, 0.0)
        self._input_tokens: list[Tensor] = []

    def add(self, output: dict[str, Tensor], plan: EchoPlan, input_tokens: Tensor | int) -> None:
        """Add a micro-batch: the output of `echo_step`, its plan, and its number of real input tokens."""
        zero = output["objective"].detach().new_zeros(())
        row = torch.stack([output.get(name, zero).detach().float() for name in (*SUMS, *MEANS)])
        self._device_sums = row if self._device_sums is None else self._device_sums + row
        self._input_tokens.append(torch.as_tensor(input_tokens))
        counts = {
            "tokens": len(plan.labels_N),
            "routed_tokens": plan.n_routed_tokens,
            "samples": plan.n_samples,
            "routed": plan.n_routed,
            "unroutable": plan.n_unroutable,
            "echo_passes": float(plan.layout is not None and not plan.weightless),
            "passes": 1,
            "p": plan.probability,
        }
        for name, value in counts.items():
            self._counts[name] += value

    def count_non_finite(self) -> None:
        """Count a micro-batch whose echo pass was thrown away."""
        self._counts["nonfinite"] += 1

    def snapshot(self) -> tuple:
        """The sums as they are, for `restore`."""
        return self._device_sums, dict(self._counts), list(self._input_tokens)

    def restore(self, snapshot: tuple) -> None:
        """Forget what was added since the snapshot."""
        self._device_sums, self._counts, self._input_tokens = snapshot

    def drain(self, accelerator: Any) -> dict[str, float]:
        """
        The means since the last call, over all processes; empty where nothing was added. Every process must call it.

        Returns:
            TRL's `entropy`, `mean_token_accuracy`, `aux_loss`, the `echo/*` metrics, and `input_tokens` (a sum).
        """
        if self._device_sums is None:
            return {}
        self._counts["input_tokens"] = float(sum(int(n) for n in self._input_tokens))
        counts = torch.tensor([self._counts[name] for name in COUNTS], device=self._device_sums.device)
        totals = accelerator.reduce(torch.cat([self._device_sums, counts]), reduction="sum")
        total = dict(zip(_COLUMNS, totals.tolist(), strict=True))
        self.clear()
        return _as_metrics(total)


def _as_metrics(total: dict[str, float]) -> dict[str, float]:
    def mean(name: str, count: str) -> float:
        return total[name] / total[count] if total[count] else 0.0

    metrics = {
        "entropy": mean("entropy", "tokens"),
        "mean_token_accuracy": mean("correct", "tokens"),
        "input_tokens": total["input_tokens"],
        "echo/objective": mean("objective", "tokens"),
        "echo/ce_plain": mean("ce_plain", "tokens"),
        "echo/p": mean("p", "passes"),
        "echo/routed": mean("routed", "samples"),
        "echo/unroutable": mean("unroutable", "samples"),
    }
    if total["routed_tokens"]:
        metrics |= {
            "echo/ce_plain_routed": mean("ce_plain_routed", "routed_tokens"),
            "echo/ce_echo": mean("ce_echo", "routed_tokens"),
            "echo/advantage": mean("ce_plain_routed", "routed_tokens") - mean("ce_echo", "routed_tokens"),
            "echo/kd": mean("kd", "routed_tokens"),
            "echo/agreement": mean("agreement", "routed_tokens"),
        }
    if total["echo_passes"]:
        metrics["echo/relative_delta"] = mean("relative_delta", "echo_passes")
        if total["gate"]:  # there is none with echo_gate="none"; a sigmoid is never zero
            metrics["echo/gate"] = mean("gate", "echo_passes")
    if total["nonfinite"]:
        metrics["echo/nonfinite"] = total["nonfinite"]
    if total["aux_loss"]:
        metrics["aux_loss"] = mean("aux_loss", "passes")
    return metrics


def input_tokens(inputs: dict[str, Any]) -> torch.Tensor | int:
    """Real tokens of a batch, as TRL counts `num_tokens`."""
    return inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
