"""What was proved for a kind of batch, and in which words it is said."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..method.forms import EchoForm
from ..passes.echo import AUTO
from ..passes.proof import ProofResult

logger = logging.getLogger(__name__)


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


def refuse_the_model(model_name: str, worst: ProofResult, results: list[ProofResult]) -> None:
    """Raise a ValueError where no pass can be right: the model sees later tokens, or its head is not what we take."""
    ahead = max(results, key=lambda result: result.sees_ahead)
    if ahead.sees_ahead > ahead.allowed:
        raise ValueError(
            f"{model_name} is no causal model: when the last token of a row is changed, what it computes for "
            f"the tokens before it changes by {ahead.sees_ahead:.1e}. It would read the answers it is trained to "
            f"predict. Use a causal language model; for BERT-like models that can be one, load it with "
            f"is_decoder=True."
        )
    head = max(results, key=lambda result: result.logits)
    if not head.head_agrees:
        raise ValueError(
            f"The logits that {model_name} computes are not those of its output embeddings on its final "
            f"hidden states (they differ by {head.logits:.1e}, rounding explains {head.logits_allowed:.1e}), so "
            f"the loss would be another model's. Report this with the model's name; until then train it with "
            f"trl.SFTTrainer, or with echo_p_start=0 and echo_p_end=0."
        )


def say(verdict: Verdict, before: Verdict | None, wanted: str) -> None:
    """Log a verdict: as a warning where a cheaper form could not be had, once."""
    measured = (
        f"Compared with the plain pass on {verdict.kind}, up to {verdict.length} tokens: final states differ by "
        f"{verdict.result.states:.1e} (rounding explains {verdict.result.allowed:.1e}), logits by "
        f"{verdict.result.logits:.1e}."
    )
    if verdict.against and (wanted == AUTO or verdict.form.runs_suffixes):
        if before is not None and before.form is verdict.form:
            return
        logger.warning(
            "The echo pass %s is not exact for this model on %s. %s. %s",
            verdict.form.instead,
            verdict.kind,
            "; ".join(verdict.against),
            measured,
        )
    elif before is None:
        logger.info("Echo pass: %s. %s", verdict.form, measured)


def no_pass(model_name: str, wanted: str, kind: str, against: list[str], tried: Sequence[EchoForm]) -> str:
    """The error where no form of the echo pass is exact."""
    found = "; ".join(against)
    if not any(form.repeats_plain for form in tried):
        return (
            f"echo_pass={wanted!r} is not exact for {model_name} on {kind} ({found}). Use echo_pass='auto', "
            f"which takes the full pass where it must."
        )
    return (
        f"No echo pass is exact for {model_name} on {kind}: with a delta of zero it must equal the plain "
        f"pass, and {found}. Report this with the model's name; until then train it with trl.SFTTrainer, or with "
        f"echo_p_start=0 and echo_p_end=0."
    )


def mixing_documents(model_name: str, result: ProofResult | None) -> str:
    """What to say where packed documents see each other in the model itself."""
    if result is None:
        return ""
    return (
        f" - {model_name} itself mixes packed documents on this attention kernel (a document's states differ "
        f"by {result.mixes:.1e} from those it has alone), in plain SFT as well: train it with packing=False and "
        f"padding_free=False, or with a flash attention kernel"
    )


def difference(result: ProofResult) -> str:
    """Why a pass is not exact."""
    if result.error is not None:
        return f"it cannot be run ({result.error})"
    return f"final states differ by {result.states:.1e}, rounding explains {result.allowed:.1e}"
