"""The report in Markdown: tables and sentences drawn from the numbers, whatever they are."""

import math
from typing import Any

from .arms import BASELINE
from .statistics import POWER

ALPHA = 0.05
EVEN = 0.005
"""Weights of the loss that differ by no more are called the same."""
_PERCENT, _NATS = 100.0, 1.0


def render(summary: dict[str, Any], recipe_text: str, plots: dict[str, str]) -> str:
    """
    The report.

    Args:
        summary: from `comparison.summarise`.
        recipe_text: the recipe as YAML, with everything resolved.
        plots: file name of the plot by adapter.
    """
    lines = ["# Ablation", ""]
    for adapter, part in summary.items():
        lines += _adapter(adapter, part, plots.get(adapter))
    lines += [
        "## How to read it",
        "",
        "Differences are paired: both arms of a pair started from the same adapter weights and saw the same batches "
        "in the same order, seed by seed. Intervals are 95 % t-intervals over seeds and test items, crossed "
        "(`echo_trainer/ablation/statistics.py`). p-values are two-sided and corrected by Holm's method for the "
        "number of rows of their table. NLL is the mean negative log-likelihood of a reference answer in nats, lower "
        "is better; it is the more sensitive measure, accuracy the one that counts. FLOPs are counted matrix "
        "products of the training, forward and backward, with the head on scored positions only. Learning rates "
        "were chosen on training examples held out of every run. Weight is that of the cross-entropies in the loss, "
        "the mean over positions: above 1 where routed samples count twice (`echo_loss: sum`), which is a matter of "
        "the step size and not of the echo.",
        "",
        "## Recipe",
        "",
        "```yaml",
        recipe_text.strip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def _adapter(adapter: str, part: dict[str, Any], plot: str | None) -> list[str]:
    lines = [f"## {'DoRA' if adapter == 'dora' else 'LoRA'}", ""]
    lines += [*_sentences(part), ""]
    lines += [*_main_table(part), ""]
    if plot:
        lines += [f"![paired differences]({plot})", ""]
    if part["contrasts"]:
        lines += ["What each part of the echo is worth, directly:", "", *_contrast_table(part), ""]
    if part["echo_passes"]:
        lines += ["The echo pass itself, which exists in training only, on the same items:", ""]
        lines += [*_echo_table(part), ""]
    if len(part["tasks"]) > 1:
        lines += ["Accuracy by task, and its paired difference to `lora` in points:", "", *_task_table(part), ""]
    lines += [*_rates(part["rates"]), ""]
    if part["faults"]:
        lines += ["**Not paired:** " + "; ".join(part["faults"]) + ".", ""]
    lines += ["| arm | what it is |", "|---|---|"]
    return [*lines, *(f"| `{arm}` | {row['what']} |" for arm, row in part["arms"].items()), ""]


def _sentences(part: dict[str, Any]) -> list[str]:
    """What the numbers say."""
    lines = []
    for metric, unit, scale in (("accuracy", "points", _PERCENT), ("nll", "nats", _NATS)):
        rows = {arm: row[metric]["to_lora"] for arm, row in part["arms"].items() if row[metric]["to_lora"]}
        known = {arm: pair for arm, pair in rows.items() if not math.isnan(pair["holm"])}
        name = "Accuracy" if metric == "accuracy" else "NLL"
        if not known:
            lines.append(f"{name}: no arm has two seeds beside `{BASELINE}` yet, so there is no interval.")
            continue
        sign = 1 if metric == "accuracy" else -1
        found = {arm: pair for arm, pair in known.items() if pair["holm"] < ALPHA}
        better = [_said(arm, p, scale, unit) for arm, p in found.items() if sign * p["difference"] > 0]
        worse = [_said(arm, p, scale, unit) for arm, p in found.items() if sign * p["difference"] < 0]
        if all(pair["low"] == pair["high"] == 0 for pair in known.values()):
            lines.append(
                f"{name}: every arm has the same {'answers right' if metric == 'accuracy' else 'figures'} as "
                f"`{BASELINE}`, item by item, so it says nothing about them: take items that are neither all solved "
                f"nor all missed, or train longer."
            )
            continue
        if not found:
            small, large = (f(p["detectable"] * scale for p in known.values()) for f in (min, max))
            lines.append(
                f"{name}: no arm differs significantly from `{BASELINE}` (Holm, {ALPHA:g}). A true difference would "
                f"have been found with {POWER:.0%} probability from {small:.2g} to {large:.2g} {unit} upwards, "
                f"depending on the arm."
            )
            continue
        text = f"{name}: "
        text += f"better than `{BASELINE}`: {', '.join(better)}. " if better else f"no arm beats `{BASELINE}`. "
        lines.append(text + (f"Worse: {', '.join(worse)}." if worse else ""))
    for entry in part["contrasts"]:
        if entry["other"] in ("echo-zero", "strong-zero"):
            lines.append(f"The injection alone (`{entry['one']}` against `{entry['other']}`): {_verdicts(entry)}.")
    lines += _of_the_weight(part)
    return [f"- {line.strip()}" for line in lines]


def _of_the_weight(part: dict[str, Any]) -> list[str]:
    """Which differences are a matter of the weight of the loss, and what that is worth, where it was measured."""
    arms = part["arms"]
    heavy = {arm: row["loss_weight"] for arm, row in arms.items() if abs(row["loss_weight"] - 1) > EVEN}
    if not heavy:
        return []
    named = ", ".join(f"`{arm}` ({weight:.2f})" for arm, weight in heavy.items())
    text = (
        f"Weight of the loss: in {named} the cross-entropies of a position weigh that much, and 1 in the others. "
        f"Their differences to `{BASELINE}` are in part a matter of that weight, which acts as a higher learning rate."
    )
    for arm in ("echo-zero", "echo-zero-no-routing"):
        if arm in heavy and arms[arm]["accuracy"]["to_lora"]:
            pairs = {metric: arms[arm][metric]["to_lora"] for metric in ("accuracy", "nll")}
            text += f" The weight alone (`{arm}` against `{BASELINE}`): {_verdicts(pairs)}."
    return [text]


def _weights(entry: dict[str, Any]) -> str:
    one, other = entry["loss_weights"]
    if math.isnan(one) or math.isnan(other):
        return "-"
    return f"{one:.2f} both" if abs(one - other) <= EVEN else f"**{one:.2f}** - {other:.2f}"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _said(arm: str, pair: dict[str, Any], scale: float, unit: str) -> str:
    return f"`{arm}` ({pair['difference'] * scale:+.3g} {unit})"


def _verdicts(entry: dict[str, Any]) -> str:
    return "; ".join(_verdict(entry, *m) for m in (("accuracy", "points", _PERCENT), ("nll", "nats", _NATS)))


def _verdict(entry: dict[str, Any], metric: str, unit: str, scale: float) -> str:
    pair = entry[metric]
    name = "accuracy" if metric == "accuracy" else "NLL"
    if math.isnan(pair["p"]):
        return f"{name} {pair['difference'] * scale:+.3g} {unit}, one seed"
    if pair["low"] == pair["high"]:
        return f"{name} the same on every item"
    clear = "significant" if pair["holm"] < ALPHA else f"not significant, detectable {pair['detectable'] * scale:.2g}"
    return f"{name} {_interval(pair, scale)} {unit}, {clear}"


def _main_table(part: dict[str, Any]) -> list[str]:
    items = sum(part["n_items"].values())
    clock = "CPU time" if any(row["clock"] == "training_cpu_seconds" for row in part["arms"].values()) else "time"
    lines = [
        f"{len(part['tasks'])} test set{'s' if len(part['tasks']) > 1 else ''}, {items} items; accuracy in %, "
        f"differences to `{BASELINE}` in points.",
        "",
        "| arm | seeds | steps | weight | accuracy | difference | p | NLL | difference | p | FLOPs | "
        f"{clock} | memory |",
        f"|{'---|' * 13}",
    ]
    for arm, row in part["arms"].items():
        cells = [f"`{arm}`", str(len(row["seeds"])), f"{row['steps']:.0f}", _number(row["loss_weight"])]
        for metric, scale, digits in (("accuracy", _PERCENT, 1), ("nll", _NATS, 4)):
            pair = row[metric]["to_lora"]
            cells.append(f"{row[metric]['mean'] * scale:.{digits}f}")
            cells += [_interval(pair, scale, digits + (metric == "accuracy")), _p(pair["holm"])] if pair else ["", ""]
        memory = row["peak_memory"]
        cells += [f"{row['flops_ratio']:.3f}", f"{row['time_ratio']:.2f}"]
        cells.append("-" if math.isnan(memory) else f"{memory / 2**30:.2f} GiB")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _contrast_table(part: dict[str, Any]) -> list[str]:
    lines = ["| | isolates | weight | accuracy, points | p | NLL, nats | p |", "|---|---|---|---|---|---|---|"]
    for entry in part["contrasts"]:
        accuracy, nll = entry["accuracy"], entry["nll"]
        lines.append(
            f"| `{entry['one']}` - `{entry['other']}` | {entry['what']} | {_weights(entry)} | "
            f"{_interval(accuracy, _PERCENT, 2)} | {_p(accuracy['holm'])} | "
            f"{_interval(nll, _NATS, 4)} | {_p(nll['holm'])} |"
        )
    return lines


def _echo_table(part: dict[str, Any]) -> list[str]:
    lines = ["| echo pass of | accuracy | NLL | minus | accuracy, points | NLL, nats |", f"|{'---|' * 6}"]
    for entry in part["echo_passes"]:
        other = "its own plain path" if entry["other"] == entry["arm"] else f"`{entry['other']}`"
        other = f"the echo pass of {other}" if entry["other_echo"] else other
        lines.append(
            f"| `{entry['arm']}` | {entry['mean_accuracy'] * 100:.1f} | {entry['mean_nll']:.4f} | {other} | "
            f"{_interval(entry['accuracy'], _PERCENT, 2)} | {_interval(entry['nll'], _NATS, 4)} |"
        )
    return lines


def _task_table(part: dict[str, Any]) -> list[str]:
    tasks = part["tasks"]
    heads = [f"{task} ({part['n_items'][task]})" for task in tasks]
    lines = [f"| arm | {' | '.join(heads)} |", "|---" * (len(tasks) + 1) + "|"]
    for arm, row in part["arms"].items():
        cells = []
        for task in tasks:
            cell = f"{row['accuracy']['by_task'][task] * 100:.1f}"
            pair = row["accuracy"]["to_lora_by_task"].get(task)
            cells.append(f"{cell} ({_interval(pair, _PERCENT, 1)})" if pair else cell)
        lines.append(f"| `{arm}` | {' | '.join(cells)} |")
    return lines


def _rates(rates: dict[str, Any]) -> list[str]:
    lines = []
    for family, entry in rates.items():
        text = f"Learning rate of `{family}` and its family: {entry['chosen']:g}"
        if entry["held_out_nll"]:
            tried = ", ".join(f"{rate}: {nll:.4f}" for rate, nll in entry["held_out_nll"].items())
            seeds = entry["seeds"]
            whose = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}, mean"
            text += f" (held-out NLL, {whose}: {tried})"
        lines.append(f"- {text}{'; at the end of the grid' if entry['at_the_end'] else ''}.")
    return lines


def _interval(pair: dict[str, Any], scale: float, digits: int = 3) -> str:
    middle = f"{pair['difference'] * scale:+.{digits}f}"
    if math.isnan(pair["low"]) or pair["low"] == pair["high"]:  # one seed, or the same on every item of every seed
        return middle
    return f"{middle} [{pair['low'] * scale:+.{digits}f}, {pair['high'] * scale:+.{digits}f}]"


def _p(value: float) -> str:
    return "-" if math.isnan(value) else ("<0.001" if value < 0.001 else f"{value:.3f}")
