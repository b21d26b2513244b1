"""Log-probabilities of given tokens at given places of a batch; logits exist for a chunk of places at a time.

B rows · T tokens · d hidden size · Q places that are asked for · V vocabulary
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..compat.cache import cache_keyword
from ..method import losses
from ..passes.head import LanguageModelHead, with_head
from ..passes.layers import backbone, decoder_layers


@dataclass(frozen=True)
class Question:
    """How likely is `token` after the token in column `place` of row `row`?"""

    row: int
    place: int
    token: int


@torch.no_grad()
def token_scores(
    base: PreTrainedModel,
    ids_BT: Tensor,
    mask: Tensor,
    position_ids: Tensor,
    cache: DynamicCache | None,
    questions: Sequence[Question],
) -> list[tuple[float, bool]]:
    """
    Log-probability of each token asked for, in nats, and whether it is the most likely one.

    Args:
        base: a causal language model, with its adapter's layers if it has one.
        ids_BT: tokens to read.
        mask: 1 for tokens that may be seen, (B, T) or with those in the cache before them.
        position_ids: (B, T).
        cache: what was read before; the tokens are added to it. None reads without one.
        questions: in any order.
    """
    below = backbone(base, decoder_layers(base))
    options: dict[str, Any] = {"use_cache": False}
    if cache is not None:
        options = {"use_cache": True, cache_keyword(below): cache}
    if "position_ids" in inspect.signature(below.forward).parameters:
        options["position_ids"] = position_ids
    outputs = below(input_ids=ids_BT, attention_mask=mask, **options)
    if not questions:
        return []
    # A place that several tokens are asked at is projected once.
    places = {(q.row, q.place): 0 for q in questions}
    numbers = {place: number for number, place in enumerate(places)}
    asked = [(numbers[q.row, q.place], q.token) for q in questions]
    rows, columns = zip(*places, strict=True)
    hidden_Qd = outputs.last_hidden_state[list(rows), list(columns)]

    def read(head: LanguageModelHead) -> list[tuple[float, bool]]:
        found: dict[int, tuple[float, bool]] = {}
        chunk = max(1, losses.CHUNK_LOGITS // head.vocabulary)
        for start in range(0, len(hidden_Qd), chunk):
            log_QV = head.logits(hidden_Qd[start : start + chunk]).float().log_softmax(-1)
            here = [(i, n - start, token) for i, (n, token) in enumerate(asked) if start <= n < start + chunk]
            at = torch.tensor([n for _, n, _ in here], device=log_QV.device)
            wanted = torch.tensor([token for _, _, token in here], device=log_QV.device)
            likely = log_QV[at, wanted].double().tolist()
            top = log_QV.argmax(-1)[at].eq(wanted).tolist()
            found |= {i: pair for (i, _, _), pair in zip(here, zip(likely, top, strict=True), strict=True)}
        return [found[i] for i in range(len(asked))]

    return with_head(base, below, outputs, read)
