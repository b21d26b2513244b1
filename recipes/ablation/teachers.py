"""Other teachers than the strong echo, in the setting of `strong.yaml`: what each does to the plain path.

    bash recipes/ablation/teachers.sh runs/ablation-teachers                       # makes the data, then runs this
    bash recipes/ablation/teachers.sh runs/ablation-teachers --arms ema strong --seeds 490 --learning_rates 4e-3

Every arm is trained with each seed and rate, finished runs are kept, and the same command goes on. The rate of an arm
is the one with the lowest mean NLL on 200 held-out training examples. `summary.json` and the printed table hold, by
arm, the plain path (which is deployed), the teacher, and the paired difference of the plain path to `lora-longer`.

Shapes: B rows of T tokens, d hidden size, N positions that predict an answer token, G routed answers, S source layers.
"""

import argparse
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from echo_trainer.ablation.arms import ARMS, Arm
from echo_trainer.ablation.comparison import ArmRuns, paired
from echo_trainer.ablation.data import fingerprints
from echo_trainer.ablation.echoes import NETWORKS
from echo_trainer.ablation.evaluating import evaluate_run
from echo_trainer.ablation.files import ITEMS, RESULT
from echo_trainer.ablation.plan import Run, digest, run_folder, specification
from echo_trainer.ablation.recipe import AblationRecipe, load_recipe, parse_seeds
from echo_trainer.ablation.results import is_finished, load_items, load_result
from echo_trainer.ablation.run_one import Workbench, build_trainer
from echo_trainer.ablation.trainer import AblationTrainer
from echo_trainer.evaluation.echo import EchoReader
from echo_trainer.evaluation.readers import PlainReader
from echo_trainer.files import write_json
from echo_trainer.method.losses import cross_entropy, distillation
from echo_trainer.method.network import EchoNetworks
from echo_trainer.passes.layer_io import hidden_of
from echo_trainer.passes.layers import backbone, decoder_layers
from echo_trainer.passes.modules import base_model_of
from echo_trainer.progress import Lines
from echo_trainer.quiet import quiet_libraries
from echo_trainer.run.answers import PLAN_KEY

DECAY, TEMPERATURE, COMPETITOR, RATES = 0.99, 2.0, "lora-longer", [4e-3, 2e-3]
PLAIN = {"echo_p_start": 0.0, "echo_p_end": 0.0}
STRONG = {"echo_preset": "strong"}


class ExtraLoss(AblationTrainer):
    """
    L = share [ loss of the package + (1 / N) extra ]; `extra` sees what the modules of `watched` returned meanwhile.

    With a share of 1/2 the cross-entropies of two passes weigh as much together as that of one, as in `strong`.
    """

    share = 0.5

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        given = dict(inputs)
        with watching(self.watched()) as seen:
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        return self.share * (loss + self.extra(given, *seen) / num_items_in_batch)

    @property
    def base(self) -> Any:
        return base_model_of(self.model)

    def watched(self) -> list[nn.Module]:
        return [backbone(self.base, decoder_layers(self.base))]

    def extra(self, inputs: dict[str, Any], *seen: list[Tensor]) -> Tensor:
        """A sum over answer tokens."""
        raise NotImplementedError

    def logits_NV(self, hidden_BTd: Tensor, labels_BT: Tensor) -> Tensor:
        """Logits where an answer token is predicted; a Llama has nothing between its last norm and its head."""
        return self.base.get_output_embeddings()(hidden_BTd[:, :-1][labels_BT[:, 1:] != -100])

    def again(self, inputs: dict[str, Any]) -> Tensor:
        """The same logits from another forward."""
        hidden_BTd = self.watched()[0](inputs["input_ids"], inputs["attention_mask"], use_cache=False)
        return self.logits_NV(hidden_BTd.last_hidden_state, inputs["labels"])


class RDrop(ExtraLoss):
    """[ CE(p) + CE(q) + 1/2 (KL(p || q) + KL(q || p)) ] / 2, p and q of two dropout masks, both with a gradient."""

    def extra(self, inputs: dict[str, Any], hidden: list[Tensor]) -> Tensor:
        p, q = self.logits_NV(hidden[0], inputs["labels"]), self.again(inputs)
        labels = inputs["labels"][:, 1:]
        return cross_entropy(q, labels[labels != -100]).sum() + symmetric_kl(p, q) / 2


def symmetric_kl(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    """KL(p || q) + KL(q || p), the sum over positions."""
    p_log, q_log = p_NV.log_softmax(-1), q_NV.log_softmax(-1)
    return ((p_log.exp() - q_log.exp()) * (p_log - q_log)).sum()


class Averaging(AblationTrainer):
    """Keeps the moving average of the LoRA weights; its decay grows to `decay` as in Mean Teacher (Tarvainen 2017)."""

    decay = DECAY

    def follow(self) -> None:
        """Take the weights of now into the average; once a step."""
        decay = min(1 - 1 / (self.state.global_step + 1), self.decay)
        now = {m: m.weight.detach() for name, m in self.model.named_modules() if "lora_" in name and hasattr(m, "weight")}
        before = getattr(self, "average", now)
        self.average = {m: decay * before[m] + (1 - decay) * weight for m, weight in now.items()}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model has the averaged weights inside, without a gradient."""
        own = {module: module.weight for module in self.average}
        try:
            for module, weight in self.average.items():
                module.weight = nn.Parameter(weight, requires_grad=False)
            yield
        finally:
            for module, weight in own.items():
                module.weight = weight

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.follow()
        return super().compute_loss(model, inputs, *args, **kwargs)

    def teacher(self):
        self.follow()
        return AveragedReader(self, super().teacher() or PlainReader(self.model, self.processing_class))


class AveragedReader:
    """What a reader reads and writes with the averaged weights."""

    def __init__(self, trainer: Averaging, reader: Any):
        self.trainer, self.reader = trainer, reader

    def score(self, *args: Any) -> Any:
        with self.trainer.averaged():
            return self.reader.score(*args)

    def answers(self, *args: Any, **options: Any) -> Any:
        with self.trainer.averaged():
            return self.reader.answers(*args, **options)


class Ema(Averaging, ExtraLoss):
    """[ CE + tau^2 KL(averaged weights || plain) ] / 2, no injection."""

    def extra(self, inputs: dict[str, Any], hidden: list[Tensor]) -> Tensor:
        with torch.no_grad(), self.averaged():
            teacher = self.again(inputs)
        return distillation(self.logits_NV(hidden[0], inputs["labels"]), teacher, TEMPERATURE, "echo").sum()


class EmaStrong(Averaging):
    """`strong` whose echo pass runs with the averaged weights; z and the echo networks are those of now."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        plan = self.at_work.plan
        form = replace(plan.form, run=partial(self.run_averaged, plan.form.run))
        return super().compute_loss(model, {**inputs, PLAN_KEY: replace(plan, form=form)}, *args, **kwargs)

    def run_averaged(self, run: Callable, *args: Any) -> Any:
        with self.averaged():
            return run(*args)


class HiddenKD(ExtraLoss):
    """`strong` + sum over the last `depth` layers of 1 - cos(plain, sg echo) of their outputs at answer tokens."""

    share, depth = 1.0, 1

    def watched(self) -> list[nn.Module]:
        return list(decoder_layers(self.base))[-self.depth :]

    def extra(self, inputs: dict[str, Any], *layers: list[Tensor]) -> Tensor:
        plan = self.at_work.plan
        at = plan.predict_N[plan.reach_E]  # both passes ran all rows whole
        pairs = [[states.flatten(0, 1)[at] for states in passes] for passes in layers]
        return sum((1 - F.cosine_similarity(plain, echo.detach(), dim=-1)).sum() for plain, echo in pairs)


class HiddenKDUpper(HiddenKD):
    depth = 4


class GivenNetworks(EchoNetworks):
    """Echo networks whose next z is made of `given` (S, G, d), where something is."""

    given: Tensor | None = None

    def aggregate(self, states_SGd: Tensor) -> Tensor:
        given, self.given = self.given, None
        return super().aggregate(states_SGd if given is None else given.to(states_SGd))


class Privileged(AblationTrainer):
    """`strong` whose z is read at the end of a prompt that has the sentences its question is about once more."""

    before, shuffled = "Question:", False

    def compute_loss(self, model, inputs, *args, **kwargs):
        first_B = (inputs["labels"] != -100).int().argmax(1).tolist()
        pairs = zip(inputs["input_ids"], first_B, strict=True)
        self.give([self.processing_class.decode(row[:first]) for row, first in pairs])
        return super().compute_loss(model, inputs, *args, **kwargs)

    def give(self, prompts: list[str]) -> None:
        """The next z is that of these prompts, G of them."""
        told = [relevant(prompt) for prompt in prompts]
        if self.shuffled:
            told = told[1:] + told[:1]
        texts = [p.replace(self.before, f"{t} {self.before}") for p, t in zip(prompts, told, strict=True)]
        batch = self.processing_class(texts, padding=True, padding_side="right", return_tensors="pt")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        states = self.echo.backbone(ids, mask, use_cache=False, output_hidden_states=True).hidden_states
        at = range(len(texts)), (mask.sum(1) - 1).tolist()
        self.echo.networks.given = torch.stack([states[source + 1][at] for source in self.echo.source_layers])

    def teacher(self):
        return PrivilegedReader(self)


class PrivilegedReader(EchoReader):
    """The echo pass with the z that it was trained with."""

    def __init__(self, trainer: Privileged):
        super().__init__(trainer.echo, trainer.processing_class, trainer.args.echo_positions)
        self.give = torch.no_grad()(trainer.give)

    def score(self, rows):
        self.give([self.tokenizer.decode(row.sequences[0][: row.start]) for row in rows])
        return super().score(rows)

    def answers(self, prompts, **options):
        self.give(sorted(prompts, key=len))  # the order in which one batch is written
        return super().answers(prompts, **options)


class PrivilegedLate(Privileged):
    before = "Answer:"


class PrivilegedShuffled(Privileged):
    shuffled = True


def relevant(prompt: str) -> str:
    """Who holds the thing that a story's question is about, and where that person is: its two sentences."""
    thing = re.search(r"where is the (\w+)\?", prompt)[1]
    holds = re.search(rf"(\w+) has the \w+ {thing}\.", prompt)
    return f"{holds[0]} {re.search(rf'{holds[1]} is in the [a-z]+[.]', prompt)[0]}"


@contextmanager
def watching(modules: list[nn.Module]) -> Iterator[list[list[Tensor]]]:
    """Of each module what it returned inside, call by call."""
    seen: list[list[Tensor]] = [[] for _ in modules]
    with ExitStack() as stack:
        for module, calls in zip(modules, seen, strict=True):
            keep = partial(_keep, calls)
            stack.callback(module.register_forward_hook(keep).remove)
        yield seen


def _keep(calls: list[Tensor], module: nn.Module, args: tuple, output: Any) -> None:
    calls.append(getattr(output, "last_hidden_state", None) if hasattr(output, "keys") else hidden_of(output))


TEACHERS: dict[str, tuple[type[AblationTrainer], dict[str, Any], str]] = {
    "lora": (AblationTrainer, PLAIN, "own"),
    "lora-longer": (AblationTrainer, PLAIN, "own"),
    "strong": (AblationTrainer, STRONG, "own"),
    "r-drop-0.05": (RDrop, {**PLAIN, "lora_dropout": 0.05}, "own"),
    "r-drop-0.1": (RDrop, {**PLAIN, "lora_dropout": 0.1}, "own"),
    "ema": (Ema, PLAIN, "own"),
    "ema-strong": (EmaStrong, {**STRONG, "echo_pass": "full"}, "own"),
    "hidden-kd": (HiddenKD, {**STRONG, "echo_pass": "full"}, "own"),
    "hidden-kd-upper": (HiddenKDUpper, {**STRONG, "echo_pass": "full"}, "own"),
    "privileged": (Privileged, STRONG, "given"),
    "privileged-late": (PrivilegedLate, STRONG, "given"),
    "privileged-shuffled": (PrivilegedShuffled, STRONG, "given"),
}
REFERENCES = ("lora", "lora-longer", "strong")
NETWORKS["given"] = GivenNetworks
for name, (kind, settings, echo) in TEACHERS.items():
    ARMS.setdefault(name, Arm(name, (kind.__doc__ or name).strip(), name, settings, echo))


def train_and_evaluate(bench: Workbench, run: Run, spec: dict[str, Any], output: Path) -> None:
    """One run; its result is written last, so that what is there is whole."""
    with tempfile.TemporaryDirectory() as scratch, quiet_libraries():
        trainer = build_trainer(bench, run, Path(scratch), lambda *_: None, TEACHERS[run.arm][0])
        bench.keep(run, trainer.train_dataset)
        trainer.train()
        tasks, items = evaluate_run(bench, trainer, lambda *_: None)
    held_out = tasks.pop(bench.held_out.name)["nll"]
    write_json(run_folder(output, run) / ITEMS, items)
    result = {"hash": digest(spec), "spec": spec, "steps": trainer.state.global_step, "held_out_nll": held_out}
    write_json(run_folder(output, run) / RESULT, result | {"tasks": tasks})


def finished(output: Path, arm: str, seeds: list[int], rate: float) -> ArmRuns:
    runs = {seed: Run(arm, "lora", seed, rate) for seed in seeds}
    there = {seed: run for seed, run in runs.items() if load_result(output, run)}
    return ArmRuns(
        {s: load_result(output, run) for s, run in there.items()}, {s: load_items(output, run) for s, run in there.items()}
    )


def summarise(recipe: AblationRecipe, output: Path, arms: list[str], rates: list[float]) -> dict[str, Any]:
    """Of every arm with finished runs: figures by rate, the rate that held-out examples choose, and comparisons."""
    by_rate = {arm: {rate: finished(output, arm, recipe.seeds, rate) for rate in rates} for arm in arms}
    chosen, summary = {}, {"seeds": recipe.seeds, "arms": {}}
    for arm, found in by_rate.items():
        most = max(len(runs.results) for runs in found.values())
        whole = {rate: runs for rate, runs in found.items() if most and len(runs.results) == most}
        if whole:
            chosen[arm] = min(whole, key=lambda rate: whole[rate].mean("held_out_nll"))
            summary["arms"][arm] = {"chosen": chosen[arm], "rates": {f"{r:g}": figures(x) for r, x in whole.items()}}
    for arm, rate in chosen.items():
        other = by_rate[COMPETITOR].get(chosen.get(COMPETITOR))
        if other is not None and arm != COMPETITOR:
            pairs = {metric: paired(by_rate[arm][rate], other, metric, ["stories"]) for metric in ("accuracy", "nll")}
            summary["arms"][arm][f"to_{COMPETITOR}"] = {metric: asdict(pair) for metric, pair in pairs.items() if pair}
    return summary


def figures(runs: ArmRuns) -> dict[str, Any]:
    tasks = {seed: result["tasks"]["stories"] for seed, result in sorted(runs.results.items())}
    keys = ("accuracy", "nll", "echo_accuracy", "echo_nll")
    means = {key: float(np.mean([task[key] for task in tasks.values()])) for key in keys if key in tasks[min(tasks)]}
    by_seed = {str(seed): task["accuracy"] for seed, task in tasks.items()}
    return {**means, "held_out_nll": runs.mean("held_out_nll"), "accuracy_by_seed": by_seed}


def table(summary: dict[str, Any]) -> str:
    lines = ["| arm | rate | held-out NLL | accuracy, % | by seed | NLL | teacher, % | NLL |", "|---" * 8 + "|"]
    for arm, entry in summary["arms"].items():
        for rate, found in entry["rates"].items():
            star = "*" if float(rate) == entry["chosen"] and len(entry["rates"]) > 1 else ""
            seeds = ", ".join(f"{value * 100:.1f}" for value in found["accuracy_by_seed"].values())
            teacher = [f"{found[k] * x:.{d}f}" if k in found else "" for k, x, d in (("echo_accuracy", 100, 1), ("echo_nll", 1, 3))]
            cells = [f"`{arm}`", rate + star, f"{found['held_out_nll']:.3f}", f"{found['accuracy'] * 100:.1f}", seeds]
            lines.append("| " + " | ".join([*cells, f"{found['nll']:.3f}", *teacher]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--arms", nargs="+", default=list(TEACHERS), choices=TEACHERS)
    parser.add_argument("--seeds", default="490-491")
    parser.add_argument("--learning_rates", nargs="+", type=float, default=RATES, help="references take the first only")
    options = parser.parse_args()
    recipe = load_recipe(
        Path(__file__).with_name("strong.yaml"),
        arms=list(dict.fromkeys([COMPETITOR, *options.arms])), seeds=parse_seeds(options.seeds), learning_rates=options.learning_rates,
    )
    known, bench = fingerprints(recipe), Workbench(recipe)
    rates = {arm: recipe.learning_rates[: 1 if arm in REFERENCES else None] for arm in recipe.arms}
    runs = [
        Run(arm, "lora", seed, rate)
        for rate in recipe.learning_rates
        for arm in recipe.arms
        for seed in recipe.seeds
        if rate in rates[arm]
    ]
    with Lines(Console(), width=40) as bar:
        line = bar.add_task("runs", total=len(runs))
        for number, run in enumerate(runs, 1):
            spec = specification(recipe, run, known)
            if not is_finished(options.output, run, spec):
                train_and_evaluate(bench, run, spec, options.output)
            bar.update(line, advance=1, description=run.id)
            tasks = load_result(options.output, run)["tasks"]["stories"]
            bar.say(f"{number} of {len(runs)} {run.id}: " + ", ".join(f"{k} {v:.3f}" for k, v in tasks.items() if k != "n"))
    summary = summarise(recipe, options.output, recipe.arms, recipe.learning_rates)
    write_json(options.output / "summary.json", summary)
    print(table(summary))


if __name__ == "__main__":
    main()
