"""Metrics of the echo, summed on the device and read only when they are logged.

A `.item()` a step makes the host wait for the device. So a step only adds to a tensor, which `drain` reads in one go;
what the host knows by itself it counts in whole numbers. One reduction adds both up over the processes.
"""

import torch
from torch import Tensor

from ..method.plan import EchoPlan
from .agreement import Agreement

SUMS = ("objective", "ce_plain", "entropy", "correct", "ce_plain_routed", "ce_echo", "kd", "agreement")
MEANS = ("gate", "relative_delta", "aux_loss")
COUNTS: tuple[str, ...] = (
    "tokens", "routed_tokens", "input_tokens", "samples", "routed", "unroutable", "echo_passes", "passes", "p",
    "nonfinite",
)  # fmt: skip
_COLUMNS: tuple[str, ...] = (*SUMS, *MEANS, *COUNTS)
SEEN = {
    "micro_batches": "passes", "echo_passes": "echo_passes", "samples": "samples", "routed": "routed",
    "without_prompt": "unroutable", "not_finite": "nonfinite", "input_tokens": "input_tokens",
}  # fmt: skip
"""What is counted over a whole run, for its record, and the column it is counted in."""


class EchoMetrics:
    """
    Sums since the last log.

    Args:
        agreement: between the processes of the run.

    Attributes:
        seen: counts of the run up to the last log, by the names of `SEEN`, over all processes.
    """

    def __init__(self, agreement: Agreement) -> None:
        self.agreement = agreement
        self.begin()

    def begin(self, seen: dict[str, int] | None = None) -> None:
        """A run begins; `seen` are the counts of the one that it continues."""
        self.seen = {**dict.fromkeys(SEEN, 0), **(seen or {})}
        self.clear()

    def seen_by_now(self) -> dict[str, int]:
        """The counts of the run up to now. Every process must call it."""
        since = self.agreement.sum([self._counts[column] for column in SEEN.values()])
        return {name: before + int(count) for (name, before), count in zip(self.seen.items(), since, strict=True)}

    def clear(self) -> None:
        """Forget what was added since the last log."""
        self._device_sums: Tensor | None = None
        self._counts: dict[str, float] = dict.fromkeys(COUNTS, 0)

    def add(self, output: dict[str, Tensor], plan: EchoPlan) -> None:
        """Add a micro-batch: the output of `echo_step`, and its plan."""
        zero = output["objective"].detach().new_zeros(())
        row = torch.stack([output.get(name, zero).detach().float() for name in (*SUMS, *MEANS)])
        self._device_sums = row if self._device_sums is None else self._device_sums + row
        counts = {
            "tokens": len(plan.labels_N),
            "routed_tokens": plan.n_routed_tokens,
            "input_tokens": plan.n_tokens,
            "samples": plan.n_samples,
            "routed": plan.n_routed,
            "unroutable": plan.n_unroutable,
            "echo_passes": int(plan.layout is not None and not plan.weightless),
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
        return self._device_sums, dict(self._counts)

    def restore(self, snapshot: tuple) -> None:
        """Forget what was added since the snapshot."""
        self._device_sums, self._counts = snapshot

    def drain(self) -> dict[str, float]:
        """
        The means since the last call, over all processes; empty where nothing was added. Every process must call it.

        Returns:
            TRL's `entropy`, `mean_token_accuracy`, `aux_loss`, the `echo/*` metrics, and `input_tokens` (a whole
            number).
        """
        if self._device_sums is None:
            return {}
        totals = self.agreement.sum([*self._device_sums.tolist(), *(self._counts[name] for name in COUNTS)])
        total = dict(zip(_COLUMNS, totals, strict=True))
        self.seen = {name: self.seen[name] + int(total[column]) for name, column in SEEN.items()}
        self.clear()
        return _as_metrics(total)


def _as_metrics(total: dict[str, float]) -> dict[str, float]:
    def mean(name: str, count: str) -> float:
        return total[name] / total[count] if total[count] else 0.0

    metrics = {
        "entropy": mean("entropy", "tokens"),
        "mean_token_accuracy": mean("correct", "tokens"),
        "input_tokens": int(total["input_tokens"]),
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
