"""A teacher: writes answers to prompts, and says how sure it is of an answer, token by token.

Shapes: B rows, T tokens, N positions that predict a token of an answer, K tokens that are kept of a distribution.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..evaluation.generation import NEUTRAL, end_tokens, pad_token_id
from ..method.plan import make_plan
from ..method.segments import IGNORE_INDEX, find_segments
from ..passes.full import ROWS
from ..passes.generating import writing_with_echo
from ..passes.modules import base_model_of
from ..passes.score import read_distributions
from ..passes.setup import EchoSetup, plain_setup
from .prompts import Prompt
from .vote import Written

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judged:
    """
    What a teacher says about an answer.

    Attributes:
        log_likelihood: of its tokens, in nats, the end token with them.
        n_tokens: how many they are.
        top: of each token the most likely ones in its place; empty where they were not asked for.
        logs: log-probabilities of these, and of all others together.
    """

    log_likelihood: float
    n_tokens: int
    top: list[list[int]]
    logs: list[list[float]]


def refuse_useless_echo(verdict: dict[str, Any] | None) -> None:
    """
    Say what a run found about its echo on held-out rows, before it teaches.

    Args:
        verdict: `Probation.record` of the run; None where it was not judged.

    Raises:
        ValueError: the run went on without its echo, so the echo belongs to an earlier adapter.
    """
    if not verdict or not verdict["useless"]:
        return
    than = "the plain pass"
    if verdict.get("networks_alone"):
        than = "with the echo of another sample, though better than the plain pass"
        if verdict["own"] is None:
            than = "with another echo, as far as held-out rows of a single prompt can tell"
    if verdict["stopped"]:
        raise ValueError(
            f"The echo was found to predict held-out answers no better than {than} at step {verdict['step']}, and the "
            f"run went on without it (echo_when_useless='stop'): its networks belong to the adapter of then. Take "
            f"teacher='plain'."
        )
    likely = "may be as good" if verdict.get("networks_alone") else "are likely as good"
    logger.warning(
        "At step %d the echo predicted held-out answers no better than %s: labels of teacher='plain' %s, and cheaper.",
        verdict["step"],
        than,
        likely,
    )


class Teacher:
    """
    A model that answers, with its adapter and echo, or without.

    Args:
        model: with an adapter, or a whole model.
        tokenizer: its tokenizer.
        kind: "echo", "plain" or "base".
        setup: the echo parts of the model, for the echo.
        positions: "answer" or "predicting", as the echo was trained.

    Raises:
        ValueError: there is no echo, or no adapter to switch off.
    """

    def __init__(
        self, model: Any, tokenizer: Any, kind: str, setup: EchoSetup | None = None, positions: str = "answer"
    ):
        if kind == "echo" and setup is None:
            raise ValueError(
                "teacher='echo' needs echo networks, and there are none: the echo is off. Train with the echo, or "
                "take teacher='plain' (the adapter labels for itself) or 'base'."
            )
        if kind == "base" and not hasattr(model, "disable_adapter"):
            raise ValueError(
                "teacher='base' is the model without its adapter, and this model has none. Take teacher='plain'."
            )
        self.model, self.tokenizer, self.kind, self.positions = model, tokenizer, kind, positions
        self.echo = setup if kind == "echo" else None
        self.setup = self.echo or plain_setup(base_model_of(model))

    def digest(self) -> str:
        """A hash of everything that can be another in another teacher of the same base: adapter and echo networks."""
        found = hashlib.sha256(self.kind.encode())
        named = list(self.model.named_parameters()) if self.kind != "base" else []
        parameters = {name: p for name, p in named if "lora_" in name or p.requires_grad}
        if self.echo is not None:
            parameters |= {f"echo.{name}": p for name, p in self.echo.networks.named_parameters()}
        for name, parameter in sorted(parameters.items()):
            found.update(name.encode())
            found.update(parameter.detach().float().cpu().numpy().tobytes())
        return found.hexdigest()[:16]

    @torch.no_grad()
    def write(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        n_samples: int = 1,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> list[list[Written]]:
        """
        Answers to each prompt of a batch: one, greedily, or several samples.

        Args:
            prompts: the batch; what is sampled depends on it as a whole.
            max_new_tokens: longest answer.
            n_samples: answers to each.
            temperature: of samples.
            seed: of samples. The generators of the process are left as they were.
        """
        model, tokenizer = self.setup.model, self.tokenizer
        model.eval()
        batch = tokenizer(
            [prompt.text for prompt in prompts],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=prompts[0].special_tokens,
        ).to(model.device)
        batch.pop("token_type_ids", None)
        ends = end_tokens(model, tokenizer)
        # Gradient checkpointing leaves a model that asks for no cache.
        options = {**NEUTRAL, "pad_token_id": pad_token_id(tokenizer), "eos_token_id": ends, "use_cache": True}
        if n_samples > 1:
            options |= {"do_sample": True, "temperature": temperature, "top_k": 0, "num_return_sequences": n_samples}
        generate: Any = model.generate
        with self._at_work(), _seeded(seed, model.device), self._writing():
            output = generate(**batch, **options, max_new_tokens=max_new_tokens)
        width, asked = batch["input_ids"].shape[1], batch["input_ids"].tolist()
        masks, written = batch["attention_mask"].tolist(), output[:, width:].tolist()
        rows = [[t for t, m in zip(ids, mask, strict=True) if m] for ids, mask in zip(asked, masks, strict=True)]
        answers = [self._read(rows[i // n_samples], ids, ends) for i, ids in enumerate(written)]
        return [answers[i : i + n_samples] for i in range(0, len(answers), n_samples)]

    def _read(self, prompt: list[int], written: list[int], ends: list[int]) -> Written:
        end = next((place for place, token in enumerate(written) if token in ends), None)
        # A tokenizer may drop the space that a text begins with, so the answer is what comes after its prompt.
        before, whole = (
            self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for ids in (prompt, prompt + written[:end])
        )
        return Written(whole[len(before) :], end is not None)

    @torch.no_grad()
    def judge(self, examples: Sequence[dict[str, list[int]]], top: int = 0, temperature: float = 1.0) -> list[Judged]:
        """
        What the teacher says about answers, each read with its prompt.

        Args:
            examples: a batch of `input_ids` and `labels`, as training makes them.
            top: most likely tokens to keep of each distribution; 0 for none.
            temperature: of the distributions.
        """
        self.setup.model.eval()
        width = max(len(example["input_ids"]) for example in examples)
        pad = pad_token_id(self.tokenizer)

        def padded(name: str, fill: int) -> torch.Tensor:
            return torch.tensor([each[name] + [fill] * (width - len(each[name])) for each in examples])

        batch = {"input_ids": padded("input_ids", pad), "labels": padded("labels", IGNORE_INDEX)}
        lengths = torch.tensor([len(each["input_ids"]) for each in examples])
        batch["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
        segments = find_segments(batch)
        routed = [self.echo is not None] * segments.n_documents
        plan = make_plan(segments, routed, positions=self.positions, form=ROWS)
        device = self.setup.model.device
        inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
        with self._at_work():
            found = read_distributions(self.setup, inputs, plan.to(device), top, temperature)
        row_N, ce_N = plan.predict_N // width, found.ce_N.double().cpu()
        top_NK, log_NK1 = found.top_NK.cpu(), found.log_NK1.float().cpu()
        judged = []
        for number in range(len(examples)):
            mine = row_N == number
            tokens, logs = (top_NK[mine].tolist(), log_NK1[mine].tolist()) if top else ([], [])
            judged.append(Judged(-float(ce_N[mine].sum()), int(mine.sum()), tokens, logs))
        return judged

    def _at_work(self) -> Any:
        return self.model.disable_adapter() if self.kind == "base" else nullcontext()

    def _writing(self) -> Any:
        return writing_with_echo(self.echo, self.positions) if self.echo is not None else nullcontext()


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of a seed inside."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
