"""The echo pass as a reader: what the teacher of a run says, beside the plain path that is deployed.

Shapes: N positions that predict a scored token, G segments that get an echo, S source layers, d hidden size.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import compress, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from ..method.advantage import Loans, partners
from ..method.network import EchoNetworks, NetworkForm
from ..method.plan import make_plan
from ..method.segments import IGNORE_INDEX, find_segments
from ..method.sites import site_key
from ..passes.full import ROWS
from ..passes.generating import writing_with_echo
from ..passes.layers import find_sites
from ..passes.modules import base_model_of
from ..passes.score import ScoreTask, score_passes
from ..passes.setup import EchoSetup
from ..run.checkpoint_files import checkpoints, damage
from ..run.echo_weights import EchoWeights, has_echo_weights, read_echo_weights
from .generation import greedy_answers, pad_token_id
from .scoring import Score, TokenizedRow

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class EchoReader:
    """
    The echo-augmented model: every answer with the echo of its own prompt.

    Args:
        setup: the model and its echo parts.
        tokenizer: its tokenizer.
        positions: "answer" or "predicting", as in training.
    """

    def __init__(self, setup: EchoSetup, tokenizer: Any, positions: str):
        self.setup, self.tokenizer, self.positions = setup, tokenizer, positions

    def score(self, rows: Sequence[TokenizedRow]) -> list[list[Score]]:
        """See `readers.Reader`. Whole sequences are run, the prompt of a row once for each of its completions."""
        flat = [(row, ids) for row in rows for ids in row.sequences]
        batch = self._batch(flat)
        segments = find_segments(batch)
        routed = [True] * segments.n_documents
        plan = make_plan(segments, routed, positions=self.positions, form=ROWS)
        device, width = self.setup.model.device, batch["input_ids"].shape[1]
        inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
        row_G, last_G = (x.numpy() for x in (plan.boundary_G // width, plan.boundary_G % width))
        prompts = [ids[: max(last_G[row_G == number], default=0) + 1] for number, (_, ids) in enumerate(flat)]
        with self.knowing(prompts, row_G):
            found = score_passes(self.setup, inputs, ScoreTask(plan.to(device)))
        row_N = plan.predict_N // width
        ce_N, top_N = found.ce_echo_N.double().cpu(), found.top_echo_N.cpu()
        scores = iter(_score(ce_N[row_N == number], top_N[row_N == number]) for number in range(len(flat)))
        return [[next(scores) for _ in row.sequences] for row in rows]

    def answers(self, prompts: list[str], **options: Any) -> list[str]:
        """See `readers.Reader`."""
        return greedy_answers(cast("PreTrainedModel", _Writing(self)), self.tokenizer, prompts, **options)

    def knowing(self, prompts: list[list[int]], prompt_G: np.ndarray) -> AbstractContextManager[None]:
        """The echo pass runs inside, on token ids of `prompts`; `prompt_G` (G,) says which its segments belong to."""
        return nullcontext()

    def _batch(self, flat: list[tuple[TokenizedRow, list[int]]]) -> dict[str, Tensor]:
        """Sequences padded on the right, with labels at the scored tokens."""
        width, pad = max(len(ids) for _, ids in flat), pad_token_id(self.tokenizer)
        ids, labels, mask = [], [], []
        for row, tokens in flat:
            scored = row.scored or [True] * (len(tokens) - row.start)
            answer = [t if s else IGNORE_INDEX for t, s in zip(tokens[row.start :], scored, strict=True)]
            rest = width - len(tokens)
            ids.append(tokens + [pad] * rest)
            labels.append([IGNORE_INDEX] * row.start + answer + [IGNORE_INDEX] * rest)
            mask.append([1] * len(tokens) + [0] * rest)
        columns = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        return {name: torch.tensor(value) for name, value in columns.items()}


class ControlReader(EchoReader):
    """
    The echo pass with networks that exchange the echoes of prompts; `networks.prompt_G` says whose are whose.

    Neighbours that are alike count as one prompt: items come by length, and a prompt may recur.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._last: tuple[int, list[int]] = (-1, [])  # number and token ids of the last prompt

    @contextmanager
    def knowing(self, prompts: list[list[int]], prompt_G: np.ndarray) -> Iterator[None]:
        """Answers to one prompt, and turns of one conversation, do not trade with each other."""
        networks: Any = self.setup.networks
        last, before = self._last
        numbers = last + np.cumsum([one != other for one, other in pairwise([before, *prompts])])
        self._last = (int(numbers[-1]), prompts[-1])
        networks.prompt_G = numbers[prompt_G]
        try:
            yield
        finally:
            networks.prompt_G = None


class BorrowedEcho(EchoNetworks):
    """
    Echo networks that are given the echo of the next prompt of the batch in place of each prompt's own.

    A prompt that is alone in its batch gets the last echo before of another one; the first of all, if it is alone,
    gets none.

    Attributes:
        prompt_G: number of the prompt that each segment belongs to, in all batches; set before each.
    """

    prompt_G: np.ndarray

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._loans = Loans()

    def aggregate(self, states_SGd: Tensor) -> Tensor:
        """z (G, d) of other prompts."""
        z_Gd = super().aggregate(states_SGd)
        lent_d = self._loans.to(int(self.prompt_G[-1]))
        for prompt, z_d in zip(self.prompt_G.tolist(), z_Gd, strict=True):
            self._loans.keep(prompt, z_d)
        lent_d = torch.zeros_like(z_Gd[0]) if lent_d is None else lent_d
        order = torch.from_numpy(partners(self.prompt_G, lent=True)).to(z_Gd.device)
        return torch.cat([z_Gd, lent_d[None]]).index_select(0, order)


class _Writing:
    """The model as `generate` sees it, with the echo in every call; all else is the model's."""

    def __init__(self, reader: EchoReader):
        self._reader = reader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader.setup.model, name)

    def generate(self, **inputs: Any) -> Tensor:
        reader = self._reader
        model: Any = reader.setup.model
        kept = zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True)
        prompts = [list(compress(*row)) for row in kept]
        # Beams of a prompt lie one after another, so that they do not trade with each other.
        beams = np.arange(len(prompts)).repeat(inputs["num_beams"])
        with reader.knowing(prompts, beams), writing_with_echo(reader.setup, reader.positions):
            return model.generate(**inputs)


def _score(ce_N: Tensor, top_N: Tensor) -> Score:
    return Score(-float(ce_N.sum()), len(ce_N), bool(top_N.all()))


def echo_checkpoint(name: str) -> Path:
    """
    The checkpoint whose echo is meant: a checkpoint, or the last whole one of a run that holds echo networks.

    Raises:
        ValueError: there is none.
    """
    folder = Path(name)
    if folder.is_dir() and has_echo_weights(name):
        return folder
    found = checkpoints(name) if folder.is_dir() else []
    for checkpoint in found:
        if has_echo_weights(str(checkpoint)) and damage(checkpoint) is None:
            return checkpoint
    there = f"of its checkpoints ({', '.join(path.name for path in found)}) none does" if found else "it has none"
    raise ValueError(
        f"{name} is neither a checkpoint with echo networks nor the folder of a run that has one: {there}. The echo "
        f"exists in checkpoints only; train with save_strategy='steps' (not save_only_model) and name one of them."
    )


def load_echo(model: Any, tokenizer: Any, checkpoint: Path, *, borrowed: bool = False) -> tuple[EchoReader, str]:
    """
    The echo of a checkpoint on the model that was loaded with its adapter.

    Args:
        model: with the adapter of the checkpoint.
        tokenizer: its tokenizer.
        checkpoint: from `echo_checkpoint`.
        borrowed: give each prompt the echo of another one (`BorrowedEcho`).

    Returns:
        The reader, and a digest of the networks.

    Raises:
        ValueError: the networks do not fit the adapter.
    """
    weights = read_echo_weights(str(checkpoint))
    setup = _setup(base_model_of(model), weights, checkpoint, BorrowedEcho if borrowed else EchoNetworks)
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    reader = ControlReader if borrowed else EchoReader
    return reader(setup, tokenizer, weights.options["positions"]), digest.hexdigest()


def _setup(base: Any, weights: EchoWeights, checkpoint: Path, kind: type[EchoNetworks]) -> EchoSetup:
    options = weights.options
    layers = sorted({int(found[1]) for key in options["targets"] if (found := re.match(r"layer(\d+)_", key))})
    sites = find_sites(base, layers, options["layers"])
    if [site_key(site) for site in sites] != options["targets"]:
        raise ValueError(
            f"The echo networks of {checkpoint} belong to the modules {', '.join(options['targets'])}, and the "
            f"adapter beside them has {', '.join(site_key(site) for site in sites)}: they are not of one run."
        )
    form = NetworkForm(bottleneck=options["bottleneck"], aggregation=options["aggregation"], gate=options["gate"])
    width = base.config.get_text_config().hidden_size
    networks = kind(sites, len(options["source_layers"]), width, form, seed=0)
    networks.load_state_dict(weights.tensors)
    return EchoSetup(base, networks.to(base.device).eval(), sites, options["source_layers"], True, options["layers"])
