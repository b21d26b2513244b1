"""What the echo pass is worth on rows that nothing is trained on: an evaluation split, or rows set aside.

On training rows the echo looks better than it is: it has fitted them. So its advantage (`method/advantage.py`) is
measured on held-out rows, with every sample routed, in evaluation mode and without a gradient, and again with the echo
of another sample. It leaves no trace: no random number is drawn, no loader is touched.
"""

import logging
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor

from ..method.advantage import partners
from ..method.forms import EchoForm
from ..passes.echo import AUTO, forms_for
from ..passes.memory import explain_out_of_memory
from ..passes.modules import base_model_of
from ..passes.proof import ProofResult
from ..passes.score import ScoreTask
from .answers import backbone_inputs
from .collate import EchoCollator
from .draft import DraftPlan
from .finding import Finding, ScoredBatch, find
from .host import Host
from .pass_choice import PassChoice
from .proof_rows import no_trace

logger = logging.getLogger(__name__)

STREAM_ROWS = 1000
"""Rows of a stream that are looked at."""


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
        found: list[tuple[int, ScoredBatch]] = []
        reached, lent = False, None
        with host.attachment.measuring(), no_trace(host.model_wrapped), host.compute_loss_context_manager():
            for first in range(0, n_batches, world):
                mine = first + rank
                # A process without a batch of its own keeps the others company; what it finds does not count. Rows
                # far from each other are one batch: neighbours may share a prompt, whose echo is no other's.
                draft = collate.draft_with_all(rows[min(mine, n_batches - 1) :: n_batches])
                scored, lent = self._score(draft, lent)
                if mine < n_batches:
                    found.append((mine, scored))
                    reached = reached or draft.answered
        parts = [part for some in agreement.gather(found) for part in some]
        if not agreement.any(reached):
            return None
        return find([scored for _, scored in sorted(parts, key=lambda part: part[0])])

    def _score(self, draft: DraftPlan, lent_Sd: Tensor | None) -> tuple[ScoredBatch, Tensor | None]:
        """
        Score a batch.

        Args:
            draft: the batch, every document routed.
            lent_Sd: source states of a segment of an earlier batch, for a batch of one document.

        Returns:
            What was found, and source states for the next batch.
        """
        host = self.host
        if self._choice is None:  # of its own: what a run proves may not depend on when it is evaluated
            # Where no form that was asked for may be exact, another one is taken: nothing is trained here.
            safe = any(form.repeats_plain for form in forms_for(host.args.echo_pass))
            wanted = host.args.echo_pass if safe else AUTO
            name, in_step = type(base_model_of(host.model)).__name__, draft.lockstep
            self._choice = PassChoice(wanted, host.agreement, name, in_step)
        self._choice.settle([draft], self.compare, host.state.global_step)
        (plan,) = self._choice.plans([draft])
        document_F = draft.segments.document_F
        partner_G = partners(document_F[plan.boundary_G].numpy(), lent=lent_Sd is not None)
        inputs: Any = send_to_device(backbone_inputs(draft.batch), host.args.device)
        task = ScoreTask(plan.to(host.args.device), torch.from_numpy(partner_G).to(host.args.device), lent_Sd)
        with explain_out_of_memory(inputs, plan, "measurement of the echo on held-out rows"):
            scores = host.model_wrapped(**inputs, echo_score=task)
        # Without a document that an echo reaches there is nothing to exchange: the passes agree.
        compared = bool((partner_G != np.arange(len(partner_G))).any())
        passes: Any = (scores.ce_plain_N, scores.ce_echo_N, scores.ce_other_N)
        found = ScoredBatch(
            *(ce_N.double().cpu().numpy() for ce_N in passes),
            compared_N=np.full(len(plan.labels_N), compared),
            label_N=plan.labels_N.numpy(),
            document_N=document_F[plan.predict_N].numpy(),
        )
        source_SGd = None if plan.weightless else scores.source_SGd
        return found, lent_Sd if source_SGd is None else source_SGd[:, -1]
