"""Log-likelihoods of completions, batched: a prompt with several completions is computed once.

B rows (one prompt each) · O completions of a row · P tokens all completions of a row begin with · V vocabulary

Stage 0 reads the tokens with which all rows of a batch begin (the template's first words), once for the batch.
Stage 1 reads the rest of the P shared tokens of every row, left-padded. It yields the log-probabilities of the shared
completion tokens and of the first token in which the completions differ; for "the correct answer is answer1 / answer2"
that is all. Stage 2, only where a completion goes on after that, reads the rest with the keys and values so far.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..method.segments import IGNORE_INDEX
from ..passes.modules import base_model_of
from .generation import pad_token_id
from .sharing import How, how_to_score
from .token_scores import Question, token_scores

_WORTH_SHARING = 8  # tokens; below this another forward costs more than it saves


@dataclass(frozen=True)
class Score:
    """
    How likely a completion is.

    Attributes:
        log_likelihood: sum of the log-probabilities of its tokens, in nats.
        n_tokens: number of its tokens.
        greedy: whether each token is the most likely one, so that greedy generation would write the completion.
    """

    log_likelihood: float
    n_tokens: int
    greedy: bool


@dataclass(frozen=True)
class TokenizedRow:
    """
    Token ids of each completion with its prompt.

    Attributes:
        sequences: prompt and completion, for each completion.
        start: the first token that is scored.
        shared: how many tokens all sequences begin with.
        scored: which tokens from `start` on are scored, where there is one sequence; None for all.
    """

    sequences: list[list[int]]
    start: int
    shared: int
    scored: tuple[bool, ...] | None = None

    def wanted(self, sequence: int, end: int) -> list[tuple[int, int]]:
        """The tokens of a sequence before `end` that are scored: their places and themselves."""
        places = [t for t in range(self.start, end) if self.scored is None or self.scored[t - self.start]]
        return [(t, self.sequences[sequence][t]) for t in places]


def tokenize_row(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completions: Sequence[str], special_tokens: bool = True
) -> TokenizedRow:
    """
    Tokenise prompt + completion as a whole, as training does; the completion starts where it leaves the prompt alone.

    Raises:
        ValueError: there is no completion, or nothing stands before or after its start.
    """
    if not completions:
        raise ValueError(f"Nothing to score after the prompt {prompt[:60]!r}: it has no completions.")
    prompt_ids = tokenizer(prompt, add_special_tokens=special_tokens)["input_ids"]
    sequences = [tokenizer(prompt + text, add_special_tokens=special_tokens)["input_ids"] for text in completions]
    start = min(_common_prefix([prompt_ids, ids]) for ids in sequences)
    if start == 0:
        raise ValueError(f"No token stands before the completion {completions[0][:60]!r}, so nothing predicts it.")
    if any(len(ids) <= start for ids in sequences):
        raise ValueError(f"A completion after the prompt {prompt[-60:]!r} has no tokens: {list(completions)!r}.")
    return TokenizedRow(sequences, start, _common_prefix(sequences))


def labelled_row(input_ids: list[int], labels: list[int]) -> TokenizedRow:
    """
    A row whose tokens with a label are scored, as the training loss counts them: the first token never is.

    Raises:
        ValueError: there is no such token.
    """
    places = [place for place, label in enumerate(labels) if label != IGNORE_INDEX and place > 0]
    if not places:
        raise ValueError(
            f"A row of {len(input_ids)} tokens has no answer after its first token, so nothing is scored."
        )
    start, end = places[0], places[-1] + 1
    scored = tuple(label != IGNORE_INDEX for label in labels[start:end])
    return TokenizedRow([input_ids[:end]], start, end, None if all(scored) else scored)


@torch.no_grad()
def score_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[TokenizedRow]
) -> list[list[Score]]:
    """
    Scores of every completion of every row; one batch. Exact whatever stands together in it, up to float noise.

    Args:
        model: a causal language model (or PeftModel) in evaluation mode.
        tokenizer: its tokenizer.
        rows: from `tokenize_row`.

    Raises:
        ValueError: the adapter works on what goes into the model and not inside it (prompt tuning).
    """
    base = base_model_of(model)
    config: Any = getattr(model, "active_peft_config", None) if base is not model else None
    if config is not None and config.is_prompt_learning:
        raise ValueError(
            f"The adapter is of the kind {config.peft_type}, which puts tokens before every text, "
            f"and texts are scored inside the model. Evaluate a LoRA or DoRA."
        )
    pad = pad_token_id(tokenizer)
    shared, whole = (partial(score, base, pad) for score in (_score_shared, _score_whole))
    begin, uneven = _batch_prefix(rows) > 0 and not _slides(base), len({row.shared for row in rows}) > 1
    # Behind a common beginning rows of unequal length have padding inside their text.
    form = (begin, uneven, bool(_long(rows)))
    how = how_to_score(base, form, rows, shared, whole)
    if how is How.SHARED:
        return shared(rows)
    if how is How.WHOLE:
        return whole(rows)
    return [[whole([replace(row, sequences=[ids])])[0][0] for ids in row.sequences] for row in rows]


def _long(rows: Sequence[TokenizedRow]) -> list[tuple[int, int]]:
    """Completions that go on after the first token in which those of a row differ: (row, completion)."""
    return [(b, o) for b, row in enumerate(rows) for o, ids in enumerate(row.sequences) if len(ids) > row.shared + 1]


def _score_shared(base: Any, pad: int, rows: Sequence[TokenizedRow]) -> list[list[Score]]:
    """The scores of a batch, each shared token computed once."""
    long = _long(rows)
    begin = _batch_prefix(rows) if not _slides(base) else 0
    cache = DynamicCache() if long or begin else None
    if begin:
        ids_1P = torch.tensor([rows[0].sequences[0][:begin]], device=base.device)
        mask_1P = torch.ones_like(ids_1P)
        token_scores(base, ids_1P, mask_1P, positions(mask_1P), cache, [])
        assert cache is not None
        cache.batch_repeat_interleave(len(rows))
    ids_BP, mask_BP = _left_padded([row.sequences[0][begin : row.shared] for row in rows], pad, base.device)
    mask_BP = torch.cat([mask_BP.new_ones(len(rows), begin), mask_BP], dim=1)
    last = ids_BP.shape[1] - 1
    sums = [[_Sum() for _ in row.sequences] for row in rows]
    asked: list[tuple[Question, list[_Sum]]] = []
    for b, row in enumerate(rows):
        for t, token in row.wanted(0, row.shared):
            asked.append((Question(b, last - row.shared + t, token), sums[b]))
        for o, ids in enumerate(row.sequences):
            if len(ids) > row.shared:
                asked.append((Question(b, last, ids[row.shared]), [sums[b][o]]))
    _ask(base, ids_BP, mask_BP, positions(mask_BP)[:, begin:], cache, asked)
    if long:
        assert cache is not None
        cache.batch_select_indices(torch.tensor([b for b, _ in long], device=base.device))
        tails = [rows[b].sequences[o][rows[b].shared :] for b, o in long]
        ids, mask = _right_padded([tail[:-1] for tail in tails], pad, base.device)
        mask_prefix = mask_BP[[b for b, _ in long]]
        whole = torch.cat([mask_prefix, mask], dim=1)
        place = positions(whole)[:, mask_prefix.shape[1] :]
        asked = [
            (Question(number, t, token), [sums[b][o]])
            for number, ((b, o), tail) in enumerate(zip(long, tails, strict=True))
            for t, token in enumerate(tail[1:])
        ]
        _ask(base, ids, whole, place, cache, asked)
    return [[total.score() for total in row] for row in sums]


def _ask(
    base: Any,
    ids: Tensor,
    mask: Tensor,
    position_ids: Tensor,
    cache: DynamicCache | None,
    asked: Sequence[tuple[Question, list["_Sum"]]],
) -> None:
    """Add the score of each token that is asked for to the sums it belongs to."""
    scores = token_scores(base, ids, mask, position_ids, cache, [question for question, _ in asked])
    for (_, sums), (log_likelihood, greedy) in zip(asked, scores, strict=True):
        for total in sums:
            total.add(log_likelihood, greedy)


def _batch_prefix(rows: Sequence[TokenizedRow]) -> int:
    """Tokens with which all rows of a batch begin, where reading them once saves something; else 0."""
    # The token before the first scored one must be read in stage 1, which gives its logits.
    count = min(_common_prefix([row.sequences[0] for row in rows]), min(row.start for row in rows) - 1)
    return count if len(rows) > 1 and count >= _WORTH_SHARING else 0


def _slides(base: PreTrainedModel) -> bool:
    """Whether some attention has a window. It is measured over padding too, which here stands inside the text."""
    config = base.config.get_text_config()
    windows = "sliding_attention" in (getattr(config, "layer_types", None) or [])
    return windows or getattr(config, "sliding_window", None) is not None


def _score_whole(base: Any, pad: int, rows: Sequence[TokenizedRow]) -> list[list[Score]]:
    """The same without shared keys and values: every completion with its prompt, for models whose past is not that."""
    flat = [(row, o) for row in rows for o in range(len(row.sequences))]
    ids_BT, mask_BT = _left_padded([row.sequences[o][:-1] for row, o in flat], pad, base.device)
    sums = [_Sum() for _ in flat]
    asked = [
        (Question(b, ids_BT.shape[1] - len(row.sequences[o]) + t, token), [sums[b]])
        for b, (row, o) in enumerate(flat)
        for t, token in row.wanted(o, len(row.sequences[o]))
    ]
    _ask(base, ids_BT, mask_BT, positions(mask_BT), None, asked)
    scores = iter(total.score() for total in sums)
    return [[next(scores) for _ in row.sequences] for row in rows]


def positions(mask_BT: Tensor) -> Tensor:
    """Position of every token in its own text, whatever is padded before it."""
    return (mask_BT.long().cumsum(-1) - 1).clamp(min=0)


class _Sum:
    """Running score of one completion."""

    def __init__(self) -> None:
        self.log_likelihood, self.n_tokens, self.greedy = 0.0, 0, True

    def add(self, log_likelihood: float, greedy: bool) -> None:
        """Add a token."""
        self.log_likelihood += log_likelihood
        self.n_tokens += 1
        self.greedy &= greedy

    def score(self) -> Score:
        if math.isnan(self.log_likelihood):
            raise ValueError(
                "The model's logits are not a number (NaN), so nothing can be scored. Its weights, or an adapter's, "
                "are damaged, or they overflow in this dtype: try float32."
            )
        return Score(self.log_likelihood, self.n_tokens, self.greedy)


def _common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Number of tokens with which all sequences begin."""
    count = 0
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        count += 1
    return count


def _left_padded(rows: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = [[pad] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _right_padded(rows: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = [list(row) + [pad] * (width - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
