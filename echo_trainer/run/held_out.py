"""What the echo pass is worth on rows that nothing is trained on: an evaluation split, or rows set aside.

On training rows the echo looks better than it is: it has fitted them. So its advantage (`method/advantage.py`) is
measured on held-out rows, with every sample routed, in evaluation mode and without a gradient, and again with the echo
of another sample. It leaves no trace: no random number is drawn, no loader is touched.
"""

import logging
from collections.abc import Callable, Hashable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device

from ..method.advantage import Loans, partners
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

    def sample(self, most: int) -> list[list[Any]]:
        """At most `most` held-out rows, evenly spread over each dataset there is; for each its own list."""
        sets = self.host.eval_dataset if self.rows is None else self.rows
        sets = list(sets) if isinstance(sets, dict) else [None if self.rows is None else self.rows]
        share = max(1, most // len(sets))
        # Through the Trainer's loader, which leaves out the columns that no collator knows.
        return [Rows(self.host.get_eval_dataloader(each), share)[:] for each in sets]

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

    def measure(self, *sets: Rows | list[Any]) -> Finding | None:
        """
        What both passes say about rows. Every process must call it, with the same ones.

        Args:
            sets: the rows of each dataset. No batch holds rows of two: they may have different columns.

        Returns:
            None where no row has an answer after a prompt.
        """
        host, agreement = self.host, self.host.agreement
        size = host.args.eval_batch_size
        # Rows far from each other are one batch: neighbours may share a prompt, whose echo is no other's.
        counts = [-(-len(rows) // size) for rows in sets]
        batches = [(rows, first, n) for rows, n in zip(sets, counts, strict=True) for first in range(n)]
        in_step = host.pass_choice is not None and host.pass_choice.one_form
        collate = EchoCollator(host.data_collator, host.args.echo_positions, in_step)
        world, rank = host.args.world_size, host.args.process_index
        found: list[tuple[int, ScoredBatch]] = []
        reached, loans = False, Loans()
        with host.attachment.measuring(), no_trace(host.model_wrapped), host.compute_loss_context_manager():
            for number in range(0, len(batches), world):
                mine = number + rank
                # A process without a batch of its own keeps the others company; what it finds does not count.
                rows, first, n = batches[min(mine, len(batches) - 1)]
                draft = collate.draft_with_all(rows[first::n])
                scored = self._score(draft, loans)
                if mine < len(batches):
                    found.append((mine, scored))
                    reached = reached or draft.answered
        parts = [part for some in agreement.gather(found) for part in some]
        if not agreement.any(reached):
            return None
        return find([scored for _, scored in sorted(parts, key=lambda part: part[0])])

    def _score(self, draft: DraftPlan, loans: Loans) -> ScoredBatch:
        """
        Score a batch.

        Args:
            draft: the batch, every document routed.
            loans: source states (S, d) of segments of earlier batches; those of this one are added.
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
        document_G = document_F[plan.boundary_G].numpy()
        prompts = _prompts(draft, plan.boundary_G.numpy(), document_G)
        lent_Sd = loans.to(prompts[-1]) if prompts else None
        partner_G = partners(document_G, lent=lent_Sd is not None, prompts=prompts)
        inputs: Any = send_to_device(backbone_inputs(draft.batch), host.args.device)
        task = ScoreTask(plan.to(host.args.device), torch.from_numpy(partner_G).to(host.args.device), lent_Sd)
        with explain_out_of_memory(inputs, plan, "measurement of the echo on held-out rows"):
            scores = host.model_wrapped(**inputs, echo_score=task)
        passes: Any = (scores.ce_plain_N, scores.ce_echo_N, scores.ce_other_N)
        document_N = document_F[plan.predict_N].numpy()
        found = ScoredBatch(
            *(ce_N.double().cpu().numpy() for ce_N in passes),
            compared_N=np.isin(document_N, document_G[partner_G != np.arange(len(partner_G))]) & (not plan.weightless),
            label_N=plan.labels_N.numpy(),
            document_N=document_N,
        )
        if scores.source_SGd is not None and not plan.weightless:
            last_D = np.flatnonzero(np.diff(document_G, append=-1) != 0)
            for prompt, last in zip(prompts, last_D.tolist(), strict=True):
                loans.keep(prompt, scores.source_SGd[:, last])
        return found


def _prompts(draft: DraftPlan, boundary_G: np.ndarray, document_G: np.ndarray) -> list[Hashable]:
    """
    What tells the prompts of the documents with a segment from each other: their tokens up to the last answer.

    Where a batch holds more than text no two are taken to be alike: the same question may be asked of two images.

    Args:
        draft: the batch.
        boundary_G, document_G: int64 (G,), boundary and document of each segment.
    """
    documents = np.unique(document_G)
    if draft.other_inputs:
        return [object() for _ in documents]
    ids_F, start_D = draft.batch["input_ids"].reshape(-1).tolist(), draft.segments.start_D.tolist()
    return [tuple(ids_F[start_D[each] : boundary_G[document_G == each][-1] + 1]) for each in documents]
