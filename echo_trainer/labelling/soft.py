"""Training on a teacher's distributions: rows that hold them get KD in place of their cross-entropy.

    L = 1/N [ sum over labelled rows CE + sum over taught rows KD ],   N the answer tokens of the global batch

KD is that of `method.soft_labels`. Shapes: B rows, T tokens, A tokens of the longest taught answer, K tokens that are
kept of a distribution, N positions with a label, V vocabulary.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

from ..config import router_loss_weight
from ..method.losses import cross_entropy
from ..method.segments import IGNORE_INDEX
from ..method.soft_labels import TOP_LOGS, TOP_TOKENS, soft_distillation
from ..passes.modules import base_model_of

LENGTHS = "teacher_lengths"
"""Name of the tensor (B,): how many tokens of a row have a distribution, 0 where it is a labelled one."""


def is_soft(dataset: Any) -> bool:
    """Whether rows of a data set hold distributions of a teacher."""
    return TOP_TOKENS in (getattr(dataset, "column_names", None) or ())


class SoftCollator:
    """
    A collator whose batches hold the distributions of their rows.

    Args:
        collate: makes the rest of a batch, labels included.
        keep_end: whether rows that are too long lose their beginning.
    """

    def __init__(self, collate: Any, keep_end: bool = False):
        self.collate, self.keep_end = collate, keep_end

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch."""
        if TOP_TOKENS not in rows[0]:  # of an evaluation
            return self.collate(rows)
        rest = [{name: row[name] for name in row if name not in (TOP_TOKENS, TOP_LOGS)} for row in rows]
        return {**self.collate(rest), **self._distributions(rows)}

    def _distributions(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        found = []
        for row in rows:
            n = sum(label != IGNORE_INDEX for label in row["labels"][1:])  # fewer than there were of a row cut off
            tokens, logs = row[TOP_TOKENS] or [], row[TOP_LOGS] or []
            span = slice(len(tokens) - n, None) if self.keep_end else slice(n)
            found.append((tokens[span], logs[span]))
        lengths = torch.tensor([len(tokens) for tokens, _ in found])
        longest = int(lengths.max())
        width = next((len(tokens[0]) for tokens, _ in found if len(tokens)), 0)
        top_BAK = torch.zeros(len(rows), longest, width, dtype=torch.int64)
        log_BAK1 = torch.zeros(len(rows), longest, width + 1)
        for number, (tokens, logs) in enumerate(found):
            if len(tokens):
                top_BAK[number, : len(tokens)] = torch.as_tensor(tokens)
                log_BAK1[number, : len(tokens)] = torch.as_tensor(logs)
        return {TOP_TOKENS: top_BAK, TOP_LOGS: log_BAK1, LENGTHS: lengths}


class SoftLabels:
    """
    The loss of a trainer whose rows hold distributions, and its figures for the log.

    Args:
        host: the trainer.
    """

    def __init__(self, host: Any):
        self.host = host
        self.temperature = 1.0
        self._sums: dict[str, Tensor] = {}

    def collator(self, collator: Any) -> Any:
        """
        The collator of the trainer, for the data it has.

        Raises:
            ValueError: its options and distributions cannot go together.
        """
        host = self.host
        if not is_soft(host.train_dataset):
            return collator
        args = host.args
        refused = {
            "packing": args.packing,
            "padding_free": host.padding_free,
            "echo_p_start": args.echo_enabled,
            "frozen_prefix_cache": args.frozen_prefix_cache,
            "label_smoothing_factor": args.label_smoothing_factor,
            "loss_type": args.loss_type != "nll",
        }
        name = next((name for name, set_ in refused.items() if set_), None)
        if name is not None or router_loss_weight(args, host.model.config) is not None:
            given = f"`{name}={getattr(args, name, True)!r}`" if name else "the load-balancing loss of this model"
            raise ValueError(
                f"The rows hold a teacher's distributions (labels='soft'), which {given} does not go together with: "
                f"each distribution belongs to one token of one row and takes the place of its cross-entropy. Take "
                f"labels='hard', or leave the option out."
            )
        return SoftCollator(collator, args.truncation_mode == "keep_end")

    def loss(self, model: Any, inputs: dict[str, Any], n_items: Any) -> tuple[Tensor, Any]:
        """
        The loss of a batch that holds distributions.

        Args:
            model: as the trainer wrapped it.
            inputs: of `SoftCollator`.
            n_items: N, where it is known; else the batch's own.

        Returns:
            The loss, and what the model returned.
        """
        rest = {name: value for name, value in inputs.items() if name not in (TOP_TOKENS, TOP_LOGS, LENGTHS)}
        predict_BT = rest.pop("labels")[:, 1:].ne(IGNORE_INDEX)
        labels_N = inputs["labels"][:, 1:][predict_BT]
        column_C = predict_BT.any(0).nonzero().flatten()
        takes = inspect.signature(type(base_model_of(self.host.model)).forward).parameters
        if "logits_to_keep" in takes:
            outputs = model(**rest, use_cache=False, logits_to_keep=column_C)
            logits_BCV = outputs.logits
        else:
            outputs = model(**rest, use_cache=False)
            logits_BCV = outputs.logits[:, column_C]
        asked_BC = predict_BT[:, column_C]
        logits_NV = logits_BCV[asked_BC].float()
        place_N = (asked_BC.cumsum(1) - 1)[asked_BC]
        row_N = torch.arange(len(asked_BC), device=asked_BC.device)[:, None].expand_as(asked_BC)[asked_BC]
        taught_N = inputs[LENGTHS][row_N] > place_N
        top_NK, log_NK1 = (inputs[name][row_N[taught_N], place_N[taught_N]] for name in (TOP_TOKENS, TOP_LOGS))
        ce = cross_entropy(logits_NV[~taught_N], labels_N[~taught_N]).sum()
        kd = soft_distillation(logits_NV[taught_N], top_NK, log_NK1, self.temperature).sum()
        self._count(ce=ce, kd=kd, n_ce=(~taught_N).sum(), n_kd=taught_N.sum())
        host = self.host
        loss = (ce + kd) / torch.as_tensor(len(labels_N) if n_items is None else n_items).clamp(min=1)
        if host.args.average_tokens_across_devices and n_items is not None:
            loss = loss * host.accelerator.num_processes
        return loss, outputs

    def drain(self) -> dict[str, float]:
        """Cross-entropy of labelled and KD of taught rows per token since the last log, of this process."""
        sums, self._sums = {name: float(value) for name, value in self._sums.items()}, {}
        return {f"distill/{name}": sums[name] / sums[f"n_{name}"] for name in ("ce", "kd") if sums.get(f"n_{name}")}

    def _count(self, **values: Tensor) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach()
