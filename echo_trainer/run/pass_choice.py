"""Which form the echo pass takes for each kind of batch: the cheapest that is proved on the user's own model.

Before the first step with a kind of batch that was not seen yet (packed after padded, images after text), and when a
batch is longer than any proved before (sliding windows and some rotary embeddings begin to matter at a length), the
passes are compared (`proof.py`): the suffix pass first, then the full pass. What agrees is used; nothing else is. A
form that failed for a kind is not tried again in the run, also after a resume: what a run does may not depend on
where it was interrupted.

The proof is a collective act: every process takes part in each, with rows of its own, and all come to one verdict.

Where running whole rows costs less than the suffixes of a batch (`method.costs`), the batch is of a kind of its own,
for which the full pass is proved first. Not where all processes must run one form: they would have to agree on it in
every micro-batch, to save little.
"""

from collections.abc import Callable, Sequence
from typing import Any

from ..method.costs import ModelShape, whole_rows_cost_less
from ..method.forms import EchoForm
from ..method.plan import EchoPlan
from ..passes.echo import AUTO, FORMS, form_named, forms_for
from ..passes.proof import ProofResult
from .agreement import Agreement
from .draft import DraftPlan
from .verdict import Verdict, difference, mixing_documents, no_pass, refuse_the_model, say

WHOLE_ROWS = ", where whole rows cost less"
"""Ends the name of a kind for which the full pass is tried before the suffix pass."""


class PassChoice:
    """
    The verdicts of a run.

    Args:
        wanted: "auto", or one of `passes.echo.pass_options` (`echo_pass`).
        agreement: between the processes of the run.
        model_name: for messages.
        one_form: every process must run the same form in each micro-batch (see `method/silence.py`).
        model: its sizes, to compare what passes cost; None where suffixes are always taken to cost less.
        recompute: a pass over suffixes computes again in backward what it would keep, where that is exact.
    """

    def __init__(
        self,
        wanted: str,
        agreement: Agreement,
        model_name: str,
        one_form: bool = False,
        model: ModelShape | None = None,
        recompute: bool = False,
    ):
        self.wanted = wanted
        self.candidates = forms_for(wanted, recompute)
        self.model = model
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
        self.failed = {kind: form_named(form) for kind, form in (failed or {}).items()}

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
        kinds = [self.kind(draft) for draft in drafts]
        pairs = zip(drafts, kinds, strict=True)
        unproved = [(kind, draft.length) for draft, kind in pairs if draft.answered and not self._proved(draft, kind)]
        if not self.agreement.any(bool(unproved)):
            return
        lengths: dict[str, int] = {}
        for kind, length in (pair for pairs in self.agreement.gather(unproved) for pair in pairs):
            lengths[kind] = max(length, lengths.get(kind, 0))
        for kind in sorted(lengths):
            own = [draft for draft, its in zip(drafts, kinds, strict=True) if its == kind and draft.answered]
            # A process without such a batch keeps the others company with another one.
            draft = max(own or drafts, key=lambda draft: draft.length)
            self._decide(kind, lengths[kind], draft, bool(own), prove, step)

    def form(self, draft: DraftPlan) -> EchoForm:
        """The form of a batch's echo pass; `settle` must have seen it."""
        if self.one_form:
            forms = [verdict.form for verdict in self.verdicts.values()]
            return max(forms, key=lambda form: list(FORMS).index(form.name), default=self.candidates[0])
        verdict = self.verdicts.get(self.kind(draft))
        return verdict.form if verdict else self.candidates[0]  # without one nothing will run

    def kind(self, draft: DraftPlan) -> str:
        """The kind of a batch that is proved: the draft's, and whether its full pass costs less than its suffixes."""
        if self.model is None or self.wanted != AUTO or self.one_form or draft.unprovable(self.candidates[0]):
            return draft.kind
        verdict = self.verdicts.get(draft.kind)
        if verdict is not None and not verdict.form.runs_suffixes:
            return draft.kind
        plan = draft.plan(self.candidates[0])
        return draft.kind + WHOLE_ROWS * whole_rows_cost_less(plan, draft.segments, self.model)

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

    def _proved(self, draft: DraftPlan, kind: str) -> bool:
        verdict = self.verdicts.get(kind)
        return verdict is not None and (draft.length <= verdict.length or verdict.form.repeats_plain)

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
        reasons = self.agreement.gather({f: draft.unprovable(f) if own else None for f in self._order(kind)})
        for form in self._candidates(kind):
            why_not = next((found[form] for found in reasons if found[form]), None)
            if why_not is None:
                everybody = self.agreement.gather((own, prove(draft, form)))
                results = [result for counts, result in everybody if counts]
                worst = max(results, key=lambda r: (r.error is not None, r.states / r.allowed))
                refuse_the_model(self.model_name, worst, results)
                if not any(result.compared for result in results) and worst.error is None:
                    return  # nothing was compared, so nothing is known
                mixing = next((r for r in results if r.mixes_documents), None)
                if worst.agrees and not (mixing and form.runs_suffixes):
                    length = max(length, before.length if before else 0)
                    self.verdicts[kind] = Verdict(kind, form, length, worst, step, against)
                    say(self.verdicts[kind], before, self.wanted)
                    return
                why_not = difference(worst) + mixing_documents(self.model_name, mixing)
            against.append(f"{form}: {why_not}")
            self.failed[kind] = form
        raise ValueError(no_pass(self.model_name, self.wanted, kind, against, self.candidates))

    def _candidates(self, kind: str) -> list[EchoForm]:
        """The forms to try: none that failed before."""
        order = self._order(kind)
        return order[order.index(self.failed[kind]) + 1 if kind in self.failed else 0 :]

    def _order(self, kind: str) -> list[EchoForm]:
        """The forms for a kind of batch, the one that is tried first at the beginning."""
        order = list(self.candidates)
        return sorted(order, key=lambda form: form.runs_suffixes) if kind.endswith(WHOLE_ROWS) else order

    def _earlier(self, kind: str) -> list[str]:
        """Why forms are not tried that failed before."""
        if kind not in self.failed:
            return []
        if kind in self.verdicts:
            return self.verdicts[kind].against
        return [f"{self.failed[kind]}: it was not exact before the run was interrupted"]
