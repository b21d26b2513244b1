"""The trainers of `teachers.py`: `EchoSFTTrainer` with another teacher, a few lines each.

Shapes: B rows of T tokens, d hidden size, N positions that predict an answer token, G answers, S source layers.
"""

import re
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from echo_trainer.ablation.trainer import AblationTrainer
from echo_trainer.evaluation.echo import EchoReader
from echo_trainer.evaluation.readers import PlainReader
from echo_trainer.method.losses import cross_entropy, distillation
from echo_trainer.method.network import EchoNetworks
from echo_trainer.passes.layer_io import hidden_of
from echo_trainer.passes.layers import backbone, decoder_layers
from echo_trainer.passes.modules import base_model_of
from echo_trainer.run.answers import PLAN_KEY


class ExtraLoss(AblationTrainer):
    """L = share [ loss of the package + extra / N ]; `extra` sees what the `watched` modules returned meanwhile."""

    share = 0.5  # two passes weigh as much together as one, as in `strong`

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        given = dict(inputs)
        with watching(self.watched()) as seen:
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        return self.share * (loss + self.extra(given, *seen) / num_items_in_batch)

    def watched(self) -> list[nn.Module]:
        base = base_model_of(self.model)
        return [backbone(base, decoder_layers(base))]

    def extra(self, inputs: dict[str, Any], *seen: list[Any]) -> Tensor:
        """A sum over answer tokens."""
        raise NotImplementedError

    def logits_NV(self, outputs: Any, labels_BT: Tensor) -> Tensor:
        """Where an answer token is predicted. A Llama has nothing between its backbone and its head."""
        head = base_model_of(self.model).get_output_embeddings()
        return head(outputs.last_hidden_state[:, :-1][labels_BT[:, 1:] != -100])

    def again(self, inputs: dict[str, Any]) -> Tensor:
        """The same logits from another forward."""
        outputs = self.watched()[0](inputs["input_ids"], inputs["attention_mask"], use_cache=False)
        return self.logits_NV(outputs, inputs["labels"])


class RDrop(ExtraLoss):
    """[ CE(p) + CE(q) + 1/2 (KL(p || q) + KL(q || p)) ] / 2, p and q of two dropout masks, both with a gradient."""

    def extra(self, inputs, outputs):
        p, q, labels = self.logits_NV(outputs[0], inputs["labels"]), self.again(inputs), inputs["labels"][:, 1:]
        return cross_entropy(q, labels[labels != -100]).sum() + symmetric_kl(p, q) / 2


def symmetric_kl(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    """KL(p || q) + KL(q || p) of logits, the sum over positions."""
    p_log, q_log = p_NV.log_softmax(-1), q_NV.log_softmax(-1)
    return ((p_log.exp() - q_log.exp()) * (p_log - q_log)).sum()


class Averaging(AblationTrainer):
    """Keeps a moving average of the LoRA weights; its decay grows to `decay` as in Mean Teacher (Tarvainen 2017)."""

    decay = 0.99

    def follow(self) -> None:
        """Take the weights of this step into the average."""
        decay = min(1 - 1 / (self.state.global_step + 1), self.decay)
        linear = [m for name, m in self.model.named_modules() if "lora_" in name and isinstance(m, nn.Linear)]
        now = {module: module.weight.detach().clone() for module in linear}
        before = getattr(self, "average", now)
        self.average = {m: decay * before[m] + (1 - decay) * weight for m, weight in now.items()}

    @contextmanager
    def averaged(self):
        """The model has the averaged weights inside, without a gradient."""
        own = {module: module.weight for module in self.average}
        try:
            for module, weight in self.average.items():
                module.weight = nn.Parameter(weight, requires_grad=False)
            yield
        finally:
            for module, weight in own.items():
                module.weight = weight

    def compute_loss(self, *args, **kwargs):
        self.follow()
        return super().compute_loss(*args, **kwargs)

    def teacher(self):
        self.follow()
        return AveragedReader(self, super().teacher() or PlainReader(self.model, self.processing_class))


class AveragedReader:
    """What another reader says with the averaged weights."""

    def __init__(self, trainer: Averaging, reader: Any):
        self.trainer, self.reader = trainer, reader

    def score(self, *args):
        with self.trainer.averaged():
            return self.reader.score(*args)

    def answers(self, *args, **options):
        with self.trainer.averaged():
            return self.reader.answers(*args, **options)


class Ema(Averaging, ExtraLoss):
    """[ CE + tau^2 KL(averaged weights || plain) ] / 2 with tau = 2, no injection."""

    def extra(self, inputs, outputs):
        with torch.no_grad(), self.averaged():
            teacher = self.again(inputs)
        return distillation(self.logits_NV(outputs[0], inputs["labels"]), teacher, 2.0, "echo").sum()


class EmaShort(Ema):
    """The same with an average of about ten steps."""

    decay = 0.9


class EmaStrong(Averaging):
    """`strong` whose echo pass runs with the averaged LoRA weights; z and the echo networks are those of the step."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        plan = self.at_work.plan
        form = replace(plan.form, run=partial(self.run_averaged, plan.form.run))
        return super().compute_loss(model, {**inputs, PLAN_KEY: replace(plan, form=form)}, *args, **kwargs)

    def run_averaged(self, run, *args):
        with self.averaged():
            return run(*args)


class HiddenKD(ExtraLoss):
    """`strong` + sum over the last `depth` layers of 1 - cos(plain, sg echo) of their outputs at answer tokens."""

    share, depth = 1.0, 1

    def watched(self):
        return list(decoder_layers(self.model))[-self.depth :]

    def extra(self, inputs, *layers):
        at = self.at_work.plan.predict_N[self.at_work.plan.reach_E]  # both passes ran all rows whole
        pairs = [[hidden_of(output).flatten(0, 1)[at] for output in outputs] for outputs in layers]
        return sum((1 - F.cosine_similarity(plain, echo.detach(), dim=-1)).sum() for plain, echo in pairs)


class HiddenKDUpper(HiddenKD):
    """The same over the layers with an adapter."""

    depth = 4


class GivenNetworks(EchoNetworks):
    """Echo networks whose next z is made of `given` (S, G, d), where something is."""

    given: Tensor | None = None

    def aggregate(self, states_SGd: Tensor) -> Tensor:
        given, self.given = self.given, None
        return super().aggregate(states_SGd if given is None else given)


class Privileged(AblationTrainer):
    """`strong` with z of a prompt that has the two sentences its question is about once more, before the question."""

    before, shuffled = "Question:", False

    def compute_loss(self, model, inputs, *args, **kwargs):
        rows = zip(inputs["input_ids"], (inputs["labels"] != -100).int().argmax(1).tolist(), strict=True)
        self.give([self.processing_class.decode(row[:start]) for row, start in rows])
        return super().compute_loss(model, inputs, *args, **kwargs)

    def give(self, prompts: list[str]) -> None:
        """Let the next z be that of these prompts."""
        told = [relevant(prompt) for prompt in prompts]
        told = told[1:] + told[:1] if self.shuffled else told
        texts = [p.replace(self.before, f"{t} {self.before}") for p, t in zip(prompts, told, strict=True)]
        batch = self.processing_class(texts, padding=True, padding_side="right", return_tensors="pt")
        ids, mask, echo = batch["input_ids"], batch["attention_mask"], self.echo
        states = echo.backbone(ids, mask, use_cache=False, output_hidden_states=True).hidden_states
        last = torch.arange(len(ids)), mask.sum(1) - 1
        echo.networks.given = torch.stack([states[source + 1][last] for source in echo.source_layers])

    def teacher(self):
        return PrivilegedReader(self)


class PrivilegedLate(Privileged):
    """The same with the sentences after the question."""

    before = "Answer:"


class PrivilegedShuffled(Privileged):
    """The control of `privileged`: the sentences of the next row of the batch."""

    shuffled = True


class PrivilegedReader(EchoReader):
    """The echo pass with the z that it was trained with."""

    def __init__(self, trainer: Privileged):
        super().__init__(trainer.echo, trainer.processing_class, trainer.args.echo_positions)
        self.give = torch.no_grad()(trainer.give)

    def score(self, rows):
        self.give([self.tokenizer.decode(row.sequences[0][: row.start]) for row in rows])
        return super().score(rows)

    def answers(self, prompts, **options):
        self.give(sorted(prompts, key=len))  # the order in which a batch is written
        return super().answers(prompts, **options)


def relevant(prompt: str) -> str:
    """The sentences that say who has the thing a story's question is about, and where that person is."""
    thing = re.search(r"where is the (\w+)\?", prompt)[1]
    has = re.search(rf"(\w+) has the \w+ {thing}\.", prompt)
    return f"{has[0]} {re.search(rf'{has[1]} is in the [a-z]+[.]', prompt)[0]}"


@contextmanager
def watching(modules: list[nn.Module]):
    """Of each module what it returned inside, call by call."""
    seen = [[] for _ in modules]
    with ExitStack() as stack:
        for module, calls in zip(modules, seen, strict=True):
            handle = module.register_forward_hook(lambda module, args, output, calls=calls: calls.append(output))
            stack.callback(handle.remove)
        yield seen
