"""What the echo pass is worth on rows that nothing is trained on: an evaluation split, or rows set aside.

On training rows the echo looks better than it is: it has fitted them. So its advantage (`method/advantage.py`) is
measured on held-out rows, with every sample routed, in evaluation mode and without a gradient. It leaves no trace: no
random number is drawn, no loader is touched.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from accelerate.utils import send_to_device

from ..method.advantage import Advantage, advantage, differing_tokens
from ..method.forms import EchoForm
from ..passes.echo import AUTO, forms_for
from ..passes.memory import explain_out_of_memory
from ..passes.modules import base_model_of
from ..passes.proof import ProofResult
from .answers import backbone_inputs
from .collate import EchoCollator
from .draft import DraftPlan
from .host import Host
from .pass_choice import PassChoice
from .proof_rows import no_trace

logger = logging.getLogger(__name__)

STREAM_ROWS = 1000
"""Rows of a stream that are looked at."""


@dataclass(frozen=True)
class Finding:
    """
    How both passes predict held-out answers.

    Attributes:
        echo_loss: CE_echo per answer token, nats.
        gain: the advantage over all answer tokens.
        content: the advantage over the tokens in which answers differ; None where that is all of them, or none.
    """

    echo_loss: float
    gain: Advantage
    content: Advantage | None

    @property
    def telling(self) -> Advantage:
        """The advantage that says whether the echo knows something: that of the content, where there is other text."""
        return self.content or self.gain

    def metrics(self, prefix: str) -> dict[str, float]:
        """The figures by name, for the log."""
        found = {f"{prefix}loss": self.echo_loss}
        for name, value in (("advantage", self.gain), ("advantage_content", self.content)):
            if value is not None:
                found |= {f"{prefix}{name}": value.value, f"{prefix}{name}_se": value.error}
        return found


class Rows:
    """
    Rows of a data loader's dataset, read when they are asked for by slice.

    Args:
        loader: as the Trainer makes it.
        most: so many, evenly spread; None is all. Of a stream the first ones, `STREAM_ROWS` at most.
    """

    def __init__(self, loader: Any, most: int | None = None):
        self.data = loader.dataset
        if not hasattr(self.data, "__len__"):
            stream: Iterator[Any] = iter(getattr(self.data, "dataset", self.data))  # not a process's share of it
            self.data = list(islice(stream, min(most or STREAM_ROWS, STREAM_ROWS)))
        self.count = len(self.data) if most is None else min(most, len(self.data))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, span: slice) -> list[Any]:
        return [self.data[place * len(self.data) // self.count] for place in range(self.count)[span]]


class HeldOut:
    """
    Measures for a trainer.

    Args:
        host: the trainer.
        compare: compares the passes on rows of a batch, as for `PassChoice.settle`.

    Attributes:
        rows: training rows that were set aside, None where there are none.
    """

    def __init__(self, host: Host, compare: Callable[[DraftPlan, EchoForm], ProofResult]):
        self.host, self.compare = host, compare
        self.rows: Any = None
        self._choice: PassChoice | None = None

    def set_aside(self, count: int) -> None:
        """
        Take `count` rows out of the training data, drawn with the seed of the echo; none for 0.

        Raises:
            ValueError: the data is a stream, nothing would be left, or there is an evaluation split.
        """
        data = self.host.train_dataset
        if not count:
            return
        if self.host.eval_dataset is not None:
            raise ValueError(
                f"`echo_held_out={count}` sets training rows aside to judge the echo on, and there is an "
                f"`eval_dataset`, on which it is judged anyway. Leave one of them out."
            )
        if not hasattr(data, "__len__") or len(data) <= count:
            size = f"{len(data)} rows" if hasattr(data, "__len__") else "a stream"
            raise ValueError(
                f"`echo_held_out={count}` sets rows aside, and the training data is {size}. Set fewer aside, or pass "
                f"an `eval_dataset`."
            )
        order = np.random.default_rng(self.host.args.resolved_echo_seed).permutation(len(data))
        self.rows = data.select(sorted(order[:count].tolist()))
        self.host.train_dataset = data.select(sorted(order[count:].tolist()))

    @property
    def given(self) -> bool:
        """Whether there is anything to measure on."""
        return self.rows is not None or self.host.eval_dataset is not None

    def sample(self, most: int) -> list[Any]:
        """At most `most` held-out rows, evenly spread over each dataset there is."""
        sets = self.host.eval_dataset if self.rows is None else self.rows
        sets = list(sets) if isinstance(sets, dict) else [None if self.rows is None else self.rows]
        share = max(1, most // len(sets))
        # Through the Trainer's loader, which leaves out the columns that no collator knows.
        return [row for each in sets for row in Rows(self.host.get_eval_dataloader(each), share)[:]]

    def added_to(
        self, output: Any, loader: Any, description: str, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> Any:
        """
        The output of an evaluation loop, with metrics of the echo pass on the same rows where `evaluate` ran it.

        Args:
            output: of the Trainer's loop.
            loader, description, metric_key_prefix, kwargs: its arguments.
        """
        if description == "Evaluation":
            output.metrics.update(self.metrics(loader, metric_key_prefix))
        return output

    def metrics(self, loader: Any, prefix: str) -> dict[str, float]:
        """What is to be said about the echo pass on a loader's rows; nothing where there is no echo any more."""
        host = self.host
        if host.echo is None or host.echo.model is not base_model_of(host.model) or host.probation.stopped:
            return {}
        finding = self.measure(Rows(loader))
        return finding.metrics(f"{prefix}_echo_") if finding is not None else {}

    def measure(self, rows: Rows | list[Any]) -> Finding | None:
        """
        What both passes say about rows. Every process must call it, with the same ones.

        Returns:
            None where no row has an answer after a prompt.
        """
        host, agreement = self.host, self.host.agreement
        size = host.args.eval_batch_size
        n_batches = -(-len(rows) // size)
        in_step = host.pass_choice is not None and host.pass_choice.one_form
        collate = EchoCollator(host.data_collator, host.args.echo_positions, in_step)
        world, rank = host.args.world_size, host.args.process_index
        found, reached = [], False
        with host.attachment.measuring(), no_trace(host.model_wrapped), host.compute_loss_context_manager():
            for first in range(0, n_batches, world):
                mine = first + rank
                # A process without a batch of its own keeps the others company; what it finds does not count.
                start = min(mine, n_batches - 1) * size
                draft = collate.draft_with_all(rows[start : start + size])
                scored = self._score(draft)
                if mine < n_batches:
                    found.append((scored, mine))
                    reached = reached or draft.answered
        parts = [part for some in agreement.gather(found) for part in some]
        return _finding(sorted(parts, key=lambda part: part[1])) if agreement.any(reached) else None

    def _score(self, draft: DraftPlan) -> dict[str, np.ndarray]:
        """By name: CE_plain, CE_echo, token and document of every position of a batch."""
        host = self.host
        if self._choice is None:  # of its own: what a run proves may not depend on when it is evaluated
            # Where no form that was asked for may be exact, another one is taken: nothing is trained here.
            safe = any(form.repeats_plain for form in forms_for(host.args.echo_pass))
            wanted = host.args.echo_pass if safe else AUTO
            name, in_step = type(base_model_of(host.model)).__name__, draft.lockstep
            self._choice = PassChoice(wanted, host.agreement, name, in_step)
        self._choice.settle([draft], self.compare, host.state.global_step)
        (plan,) = self._choice.plans([draft])
        inputs: Any = send_to_device(backbone_inputs(draft.batch), host.args.device)
        on_device = plan.to(host.args.device)
        with explain_out_of_memory(inputs, plan, "measurement of the echo on held-out rows"):
            scores = host.model_wrapped(**inputs, echo_score=on_device)
        return {
            "plain": scores.ce_plain_N.double().cpu().numpy(),
            "echo": scores.ce_echo_N.double().cpu().numpy(),
            "label": plan.labels_N.numpy(),
            "document": draft.segments.document_F[plan.predict_N].numpy(),
        }


def _finding(parts: list[tuple[dict[str, np.ndarray], int]]) -> Finding | None:
    """All batches of all processes, in the order of the rows; None where nothing is predicted."""
    plain, echo, label = (np.concatenate([part[name] for part, _ in parts]) for name in ("plain", "echo", "label"))
    first, samples = 0, []
    for part, _ in parts:
        samples.append(part["document"] + first)
        first += int(part["document"].max(initial=-1)) + 1
    sample = np.concatenate(samples)
    differs = differing_tokens(label, sample)
    content = advantage((plain - echo)[differs], sample[differs]) if not differs.all() else None
    gain = advantage(plain - echo, sample)
    return Finding(float(echo.mean()), gain, content) if gain is not None else None
