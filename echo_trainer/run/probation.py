"""The echo on probation: after a share of the run its pass must predict held-out answers better than the plain pass,
and better than it does itself with the echo of another sample.

It is judged once, before the first step that comes after the probation; one line says what was found and what the echo
costs. With `echo_when_useless="stop"` nothing is routed from there on: the loss is that of plain LoRA, and the echo
networks get gradients of exactly zero.
"""

import logging
import math
from dataclasses import asdict, dataclass
from typing import Any

from ..method.advantage import Advantage
from ..method.plan import EchoPlan
from .host import Host

logger = logging.getLogger(__name__)

LEAST_STEPS = 50
"""An echo is not judged earlier by a share of the run: its projections start at zero."""
ROWS = 512
"""Held-out rows that it is judged on, at most."""


@dataclass
class Verdict:
    """
    What was found.

    Attributes:
        step: optimizer steps done by then.
        useless: see `Finding.useless`.
        gain: the advantage over all answer tokens, as a dict (`method.advantage.Advantage`).
        content: that over the tokens in which answers differ, None where that is all of them.
        price: work of the echo pass as a share of the plain pass's, tokens times the layers they go through.
        own: by how much the own echo is better than that of another sample, likewise; None where there was no other.
    """

    step: int
    useless: bool
    gain: dict[str, Any]
    content: dict[str, Any] | None
    price: float
    own: dict[str, Any] | None = None

    @property
    def networks_alone(self) -> bool:
        """Whether the echo is useless although its pass knows more: it does so with any echo."""
        return self.useless and Advantage(**(self.content or self.gain)).clear


class Probation:
    """
    The judgement of a run, for a trainer.

    Attributes:
        verdict: None until the echo was judged.
    """

    def __init__(self, host: Host):
        self.host = host
        self.begin()

    def begin(self, state: dict[str, Any] | None = None) -> None:
        """A run begins, or goes on where `state` was taken."""
        state = state or {}
        self.verdict = Verdict(**state["verdict"]) if state.get("verdict") else None
        self._work: list[float] = state.get("work", [0.0, 0.0])
        self._given_up = False

    def state(self) -> dict[str, Any]:
        """What a run that is continued must know. JSON values."""
        return {"verdict": asdict(self.verdict) if self.verdict else None, "work": self._work}

    @property
    def stopped(self) -> bool:
        """Whether the echo was found useless, in a run that shall go on without it."""
        return self.verdict is not None and self.verdict.useless and self.host.args.echo_when_useless == "stop"

    def count(self, plan: EchoPlan, shape: tuple[int, int]) -> None:
        """Count the work of a micro-batch of `shape` (rows, tokens): tokens, each times the layers it goes through."""
        echo = self.host.echo
        if self.verdict is None and echo is not None:
            depth = len(echo.layers)
            self._work[0] += shape[0] * shape[1] * depth
            self._work[1] += echo_work(plan, shape, depth, echo.first_target)

    def due(self) -> int | None:
        """The step after which the echo is judged; None where it never is."""
        wanted, steps = self.host.args.echo_probation, self.host.state.max_steps
        due = int(wanted) if wanted >= 1 else max(LEAST_STEPS, math.ceil(wanted * steps))
        return due if wanted and due < steps else None

    def look(self) -> None:
        """Judge the echo if it is time to. Every process must call it before each step."""
        host = self.host
        if host.echo is None or self.verdict is not None or self._given_up:
            return
        due = self.due()
        if due is None or host.state.global_step < due:
            return
        finding = host.held_out.measure(*host.held_out.sample(ROWS)) if host.held_out.given else None
        if finding is None:
            self._given_up = True
            logger.warning(
                "Step %d: nothing tells whether the echo helps, since no row with an answer was held out. Pass an "
                "`eval_dataset`, or set echo_held_out=200 to set training rows aside.",
                host.state.global_step,
            )
            return
        self.verdict = verdict = Verdict(
            step=host.state.global_step,
            useless=finding.useless,
            gain=asdict(finding.gain),
            content=asdict(finding.content) if finding.content else None,
            price=self._price(),
            own=asdict(finding.own) if finding.own else None,
        )
        logger.log(logging.WARNING if verdict.useless else logging.INFO, self._sentence(verdict))
        host.log(finding.metrics("echo/held_out_"))

    def _price(self) -> float:
        """Work of the echo pass as a share of the plain pass's, of all processes. Every process must call it."""
        plain, echo = map(sum, zip(*self.host.agreement.gather(self._work), strict=True))
        return echo / plain if plain else 0.0

    def _sentence(self, verdict: Verdict) -> str:
        """A verdict in one line."""
        gain = Advantage(**verdict.gain)
        found = f"{_figure(gain)} on {gain.samples} held-out samples"
        if verdict.content:
            found += f"; on the tokens in which answers differ {_figure(Advantage(**verdict.content))}"
        found += " (CE_plain - CE_echo, nats per token)"
        own, compared = "no other prompt was held out whose echo it could be compared with", ""
        if verdict.own:
            own = f"better than with the echo of another sample: by {_figure(Advantage(**verdict.own))}"
            compared = ". So it is the echo networks that help, and not what they are told of the prompt"
        cost = f"It costs {verdict.price:.0%} of the plain pass"
        better = f"the echo pass predicts answers better than the plain pass: by {found}"
        if not verdict.useless:
            return f"Step {verdict.step}: {better}, and {own}. {cost}."
        follows = (
            "Training goes on as plain LoRA (echo_when_useless='stop')"
            if self.stopped
            else "Training goes on with it; echo_when_useless='stop' would go on as plain LoRA"
        )
        why = f"the advantage of its pass over the plain pass is {found}"
        if verdict.networks_alone:
            why = f"{better}, {'but not clearly' if compared else 'and'} {own}{compared}"
        return f"Step {verdict.step}: the echo gives nothing so far: {why}. {cost}. {follows}."

    def record(self) -> dict[str, Any] | None:
        """The verdict as JSON values, with what followed; None where there is none."""
        if self.verdict is None:
            return None
        return {**asdict(self.verdict), "networks_alone": self.verdict.networks_alone, "stopped": self.stopped}


def echo_work(plan: EchoPlan, shape: tuple[int, int], depth: int, first_target: int) -> int:
    """Tokens of the echo pass of a batch of `shape`, each times the layers it goes through."""
    if plan.layout is None:
        return 0
    work = plan.layout.work(shape)
    return work.tokens * (depth if work.whole_rows else depth - first_target)


def _figure(gain: Advantage) -> str:
    low, high = gain.interval
    return f"{gain.value:+.4f} [{low:+.4f}, {high:+.4f}]"
