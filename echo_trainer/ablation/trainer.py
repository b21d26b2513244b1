"""The trainer of an ablation run: `EchoSFTTrainer` with the echo of its arm, and a record of what it trained on."""

from typing import Any

import numpy as np
import torch

from ..evaluation.echo import ControlReader, EchoReader
from ..evaluation.readers import Reader
from ..method.forms import EchoForm
from ..passes.echo import ROWS
from ..trainer import EchoSFTTrainer
from .echoes import NETWORKS, ControlledNetworks
from .flops import SIZES, plain_sizes, step_sizes


class AblationTrainer(EchoSFTTrainer):
    """
    Overrides: which class the echo networks have, and `compute_loss`, which tells them the place in the run and notes
    the sizes of every batch (for FLOPs) and a checksum of its tokens (to show that arms saw the same batches).

    Args:
        echo: a key of `NETWORKS`.
    """

    def __init__(self, *args: Any, echo: str = "own", **kwargs: Any):
        self.echo_of_arm, self.networks_class = echo, NETWORKS[echo]
        self._sizes: list[tuple[EchoForm, np.ndarray]] = []
        self._scored: list[torch.Tensor] = []
        self._checksums: list[list[torch.Tensor]] = []
        self._weight, self._positions = 0.0, 0
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The trainer's loss; notes the batch where it is one of training."""
        if model.training:
            self._note(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _note(self, inputs: dict[str, Any]) -> None:
        step, ids, plan = self.state.global_step, inputs["input_ids"], self.at_work.plan
        if step == len(self._checksums):
            self._checksums.append([])
        networks = self.echo_networks
        if isinstance(networks, ControlledNetworks):
            networks.place = (step, len(self._checksums[step]))
        # Sums stay on the device until the run is over: a step waits for nothing.
        order = torch.arange(1, ids.numel() + 1, device=ids.device)
        self._checksums[step].append((ids.reshape(-1) * order).sum())
        rows, length = ids.shape
        if plan is not None:
            # A plain pass costs alike, whatever form it stands beside.
            form = plan.form if plan.layout is not None else ROWS
            self._sizes.append((form, step_sizes(rows, length, plan)))
            weights_N = self.loss_terms.plain_weights(plan.plain_weight_N, plan.reach_E)
            self._weight += float(weights_N.sum()) + self.loss_terms.share * len(plan.reach_E)
            self._positions += len(plan.labels_N)
        else:
            self._sizes.append((ROWS, plain_sizes(rows, length, 0)))
            self._scored.append(inputs["labels"][..., 1:].ne(-100).sum())

    def teacher(self) -> Reader | None:
        """The echo pass of a run; None without injection, where it is the plain path."""
        if self.echo is None or self.echo_of_arm == "zero":
            return None
        reader = EchoReader if self.echo_of_arm == "own" else ControlReader
        return reader(self.echo, self.processing_class, self.args.echo_positions)

    def sizes(self) -> dict[EchoForm, np.ndarray]:
        """Sizes of what was trained on (`flops.SIZES`): by the form of its echo pass, the sum over micro-batches."""
        total: dict[EchoForm, np.ndarray] = {}
        for form, sizes in self._sizes:
            total[form] = total.get(form, np.zeros(len(SIZES))) + sizes
        for count in self._scored:
            total[ROWS][SIZES.index("scored")] += int(count)
        return total

    def loss_weight(self) -> float:
        """Weight of the cross-entropies of both passes in the loss, the mean over positions; 1 for LoRA."""
        return self._weight / self._positions if self._positions else 1.0

    def batch_checksums(self) -> list[int]:
        """One number for the tokens of every optimizer step, in their order."""
        return [sum(int(value) * (i + 1) for i, value in enumerate(step)) for step in self._checksums]
