"""Which form the echo pass takes for each kind of batch: the cheapest that is proved on the user's own model.

Before the first step with a kind of batch that was not seen yet (packed after padded, images after text), and when a
batch is longer than any proved before (sliding windows and some rotary embeddings begin to matter at a length), the
passes are compared (`proof.py`): the suffix pass first, then the full pass. What agrees is used; nothing else is. A
form that failed for a kind is not tried again in the run, also after a resume: what a run does may not depend on
where it was interrupted.

The proof is a collective act: every process takes part in each, with rows of its own, and all come to one verdict.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..method.layouts import EchoForm
from ..method.plan import EchoPlan
from ..passes.proof import ProofResult
from .agreement import Agreement
from .collate import DraftPlan

logger = logging.getLogger(__name__)

CANDIDATES = {
    "auto": (EchoForm.SUFFIX, EchoForm.ROWS, EchoForm.BATCH),
    "suffix": (EchoForm.SUFFIX,),
    "full": (EchoForm.ROWS, EchoForm.BATCH),
}


@dataclass
class Verdict:
    """
    What was proved for a kind of batch.

    Attributes:
        kind: of the batch, in words.
        form: of the echo pass.
        length: tokens of the longest document it was proved with.
        result: what was measured for `form`.
        against: why each cheaper form is not used.
        step: optimizer step at which it was proved.
    """

    kind: str
    form: EchoForm
    length: int
    result: ProofResult
    step: int
    against: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """JSON values for the record of the run."""
        return {
            "batches": self.kind,
            "pass": str(self.form),
            "difference": self.result.states,
            "allowed": self.result.allowed,
            "logits_difference": self.result.logits,
            "longest_document": self.length,
            "step": self.step,
            "not": self.against,
        }


class PassChoice:
    """
    The verdicts of a run.

    Args:
        wanted: "auto", "suffix" or "full" (`echo_pass`).
        agreement: between the processes of the run.
        model_name: for messages.
        one_form: every process must run the same form in each micro-batch (see `method/silence.py`).
    """

    def __init__(self, wanted: str, agreement: Agreement, model_name: str, one_form: bool = False):
        self.wanted = wanted
        self.agreement = agreement
        self.model_name = model_name
        self.one_form = one_form
        self.verdicts: dict[str, Verdict] = {}
        self.failed: dict[str, EchoForm] = {}

    def begin(self, failed: dict[str, str] | None = None) -> None:
        """
        Forget every verdict: a run begins, perhaps with another model than the one before.

        Args:
            failed: by kind, the dearest form that had failed in the run that is continued (`state`).
        """
        self.verdicts = {}
        self.failed = {kind: EchoForm(form) for kind, form in (failed or {}).items()}

    def state(self) -> dict[str, str]:
        """What a run that is continued must know: by kind, the dearest form that failed."""
        return {kind: str(form) for kind, form in self.failed.items()}

    def settle(
        self, drafts: Sequence[DraftPlan], prove: Callable[[DraftPlan, EchoForm], ProofResult], step: int
    ) -> None:
        """
        Prove what the batches of a step need. Every process must call it in every step.

        Args:
            drafts: the micro-batches of this process.
            prove: compares the passes on rows of a batch; every process takes part.
            step: optimizer step, for the record.

        Raises:
            ValueError: neither pass is exact for the model, it sees later tokens, or `wanted` cannot be had.
        """
        unproved = [(draft.kind, draft.length) for draft in drafts if not self._proved(draft) and draft.answered]
        if not self.agreement.any(bool(unproved)):
            return
        lengths: dict[str, int] = {}
        for kind, length in (pair for pairs in self.agreement.gather(unproved) for pair in pairs):
            lengths[kind] = max(length, lengths.get(kind, 0))
        for kind in sorted(lengths):
            own = [draft for draft in drafts if draft.kind == kind and draft.answered]
            # A process without such a batch keeps the others company with another one.
            draft = max(own or drafts, key=lambda draft: draft.length)
            self._decide(kind, lengths[kind], draft, bool(own), prove, step)

    def form(self, draft: DraftPlan) -> EchoForm:
        """The form of a batch's echo pass; `settle` must have seen it."""
        if self.one_form:
            forms = [verdict.form for verdict in self.verdicts.values()]
            return max(forms, key=list(EchoForm).index, default=CANDIDATES[self.wanted][0])
        verdict = self.verdicts.get(draft.kind)
        return verdict.form if verdict else CANDIDATES[self.wanted][0]  # without one nothing will run

    def plans(self, drafts: Sequence[DraftPlan]) -> list[EchoPlan]:
        """
        The plans of a step's micro-batches; `settle` must have seen them. Every process must call it in every step.

        Where every process must run the same modules equally often, all run as many passes over suffixes as the one
        that needs most.
        """
        plans = [draft.plan(self.form(draft)) for draft in drafts]
        if not self.one_form:
            return plans
        most = [max(numbers) for numbers in zip(*self.agreement.gather([p.n_parts for p in plans]), strict=True)]
        return [
            plan if plan.n_parts == n_parts else draft.plan(self.form(draft), n_parts)
            for plan, draft, n_parts in zip(plans, drafts, most, strict=True)
        ]

    def records(self) -> list[dict[str, Any]]:
        """The verdicts as JSON values."""
        return [verdict.record() for verdict in self.verdicts.values()]

    def _proved(self, draft: DraftPlan) -> bool:
        verdict = self.verdicts.get(draft.kind)
        return verdict is not None and (draft.length <= verdict.length or verdict.form is EchoForm.BATCH)

    def _decide(
        self,
        kind: str,
        length: int,
        draft: DraftPlan,
        own: bool,
        prove: Callable[[DraftPlan, EchoForm], ProofResult],
        step: int,
    ) -> None:
        before, against = self.verdicts.get(kind), list(self._earlier(kind))
        reasons = self.agreement.gather({f: draft.unprovable(f) if own else None for f in CANDIDATES[self.wanted]})
        for form in self._candidates(kind):
            why_not = next((found[form] for found in reasons if found[form]), None)
            if why_not is None:
                everybody = self.agreement.gather((own, prove(draft, form)))
                results = [result for counts, result in everybody if counts]
                worst = max(results, key=lambda r: (r.error is not None, r.states / r.allowed))
                self._refuse_the_model(worst, results)
                if not any(result.compared for result in results) and worst.error is None:
                    return  # nothing was compared, so nothing is known
                mixing = next((r for r in results if r.mixes_documents), None)
                if worst.agrees and not (mixing and form is EchoForm.SUFFIX):
                    length = max(length, before.length if before else 0)
                    self.verdicts[kind] = Verdict(kind, form, length, worst, step, against)
                    self._say(self.verdicts[kind], before)
                    return
                why_not = f"{_difference(worst)}{self._mixing(mixing)}"
            against.append(f"{form}: {why_not}")
            self.failed[kind] = form
        raise ValueError(self._no_pass(kind, against))

    def _candidates(self, kind: str) -> list[EchoForm]:
        """The forms to try: none that failed before."""
        failed = list(EchoForm).index(self.failed[kind]) if kind in self.failed else -1
        return [form for form in CANDIDATES[self.wanted] if list(EchoForm).index(form) > failed]

    def _earlier(self, kind: str) -> list[str]:
        """Why forms are not tried that failed before."""
        if kind not in self.failed:
            return []
        if kind in self.verdicts:
            return self.verdicts[kind].against
        return [f"{self.failed[kind]}: it was not exact before the run was interrupted"]

    def _refuse_the_model(self, worst: ProofResult, results: list[ProofResult]) -> None:
        ahead = max(results, key=lambda result: result.sees_ahead)
        if ahead.sees_ahead > ahead.allowed:
            raise ValueError(
                f"{self.model_name} is no causal model: when the last token of a row is changed, what it computes for "
                f"the tokens before it changes by {ahead.sees_ahead:.1e}. It would read the answers it is trained to "
                f"predict. Use a causal language model; for BERT-like models that can be one, load it with "
                f"is_decoder=True."
            )
        head = max(results, key=lambda result: result.logits)
        if not head.head_agrees:
            raise ValueError(
                f"The logits that {self.model_name} computes are not those of its output embeddings on its final "
                f"hidden states (they differ by {head.logits:.1e}, rounding explains {head.logits_allowed:.1e}), so "
                f"the loss would be another model's. Report this with the model's name; until then train it with "
                f"trl.SFTTrainer, or with echo_p_start=0 and echo_p_end=0."
            )

    def _say(self, verdict: Verdict, before: Verdict | None) -> None:
        measured = (
            f"Compared with the plain pass on {verdict.kind}, up to {verdict.length} tokens: final states differ by "
            f"{verdict.result.states:.1e} (rounding explains {verdict.result.allowed:.1e}), logits by "
            f"{verdict.result.logits:.1e}."
        )
        if verdict.against and self.wanted == "auto":
            if before is not None and before.form is verdict.form:
                return
            logger.warning(
                "The echo pass runs whole sequences from here on (about twice the price of LoRA), since the cheaper "
                "one is not exact for this model on %s. %s. %s",
                verdict.kind,
                "; ".join(verdict.against),
                measured,
            )
        elif before is None:
            logger.info("Echo pass: %s. %s", verdict.form, measured)

    def _no_pass(self, kind: str, against: list[str]) -> str:
        found = "; ".join(against)
        if self.wanted == "suffix":
            return (
                f"echo_pass='suffix' is not exact for {self.model_name} on {kind} ({found}). Use echo_pass='auto', "
                f"which takes the full pass where it must."
            )
        return (
            f"No echo pass is exact for {self.model_name} on {kind}: with a delta of zero it must equal the plain "
            f"pass, and {found}. Report this with the model's name; until then train it with trl.SFTTrainer, or with "
            f"echo_p_start=0 and echo_p_end=0."
        )

    def _mixing(self, result: ProofResult | None) -> str:
        if result is None:
            return ""
        return (
            f" - {self.model_name} itself mixes packed documents on this attention kernel (a document's states differ "
            f"by {result.mixes:.1e} from those it has alone), in plain SFT as well: train it with packing=False and "
            f"padding_free=False, or with a flash attention kernel"
        )


def _difference(result: ProofResult) -> str:
    if result.error is not None:
        return f"it cannot be run ({result.error})"
    return f"final states differ by {result.states:.1e}, rounding explains {result.allowed:.1e}"
