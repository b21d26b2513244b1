"""The model card: Markdown with YAML metadata, from the record of a run alone and the templates in `model_cards/`."""

import json
import re
import shlex
from functools import lru_cache
from typing import Any

import jinja2
import yaml

from ..adapter.engines import ENGINES, titles
from ..adapter.rules import RULES, Verdict
from ..resources import resource_folder

TEMPLATE, BGRPO_TEMPLATE = "adapter.md.j2", "bgrpo.md.j2"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_METRICS = {"accuracy": "accuracy", "exact match": "exact_match", "exact_match": "exact_match", "f1": "f1"}


def render_card(record: dict[str, Any], curves: list[str] | None = None) -> str:
    """
    Model card of an adapter.

    Args:
        record: the content of `echo_run.json` (`run_record`, with "saved", "evaluation" and "curves").
        curves: pictures to show instead of the record's, as paths relative to the card.

    Raises:
        jinja2.UndefinedError: the record lacks something the template shows; a card is never left with a gap.
    """
    text = (
        _environment()
        .get_template(BGRPO_TEMPLATE if record.get("bgrpo") else TEMPLATE)
        .render(
            run=record if curves is None else {**record, "curves": curves},
            metadata=yaml.safe_dump(metadata(record), sort_keys=False, allow_unicode=True, width=1000),
            title=title(record),
            method=_method(record),
            echoed=had_echo(record),
            seen=record["echo"].get("seen"),
            use=usage(record),
            evaluation=record.get("evaluation") or [],
            several_seeds=any(len(row["seeds"] or []) > 1 for row in record.get("evaluation") or []),
            last=last_metrics(record["metrics"], record["steps"]["adapter"]),
            mean_loss=mean_loss(record["metrics"], record["steps"].get("continued_from", 0)),
        )
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    """Where templates are compiled, once for all the checkpoints of a run."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(resource_folder("model_cards")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "json": lambda value: json.dumps(value, ensure_ascii=False),
        "value": _value,
        "number": _number,
        "duration": _duration,
        "count": lambda value: f"{value:,}",
        "fence": _fence,
        "layers": lambda indices: ("layer " if len(indices) == 1 else "layers ") + ", ".join(map(str, indices)),
        "seeds": _seeds,
        "dtype": lambda names: "/".join(_DTYPES.get(name) or name for name in names.split("/")),
    }
    return environment


def metadata(record: dict[str, Any]) -> dict[str, Any]:
    """The card's YAML block, in the Hub's vocabulary."""
    whole = _is_whole(record)
    found: dict[str, Any] = {"library_name": "transformers" if whole else "peft"}
    if record["base_model"]:
        found |= {"base_model": record["base_model"], "base_model_relation": "finetune" if whole else "adapter"}
    found["pipeline_tag"] = "text-generation"
    if record["license"]:
        found["license"] = record["license"]
    if record["data"]["dataset"]:
        found["datasets"] = [record["data"]["dataset"]]
    found["tags"] = [
        *([f"base_model:adapter:{record['base_model']}"] if record["base_model"] and not whole else []),
        *(["lora"] if not whole else []),
        *(["dora"] if _method(record) == "DoRA" else []),
        *(["echo-lora"] if had_echo(record) else []),
        "trl",
        *(["grpo", "bgrpo"] if record.get("bgrpo") else ["sft"]),
    ]
    if record.get("evaluation"):
        found["model-index"] = [{"name": _name(record), "results": [_result(each) for each in record["evaluation"]]}]
    return found


def had_echo(record: dict[str, Any]) -> bool:
    """Whether an echo pass was seen to run; of older records, which do not say so, whether it was switched on."""
    seen = record["echo"].get("seen")
    return record["echo"]["enabled"] and (seen is None or seen["echo_passes"] > 0)


def _is_whole(record: dict[str, Any]) -> bool:
    """Whether all weights were trained and there is no adapter."""
    return bool(record.get("bgrpo") and record["bgrpo"]["whole_model"])


def usage(record: dict[str, Any]) -> dict[str, Any]:
    """What the commands on the card need: names of base and adapter in shell and Python, ranks, a prompt."""
    base, saved, example = record["base_model"], record["saved"], record["example"]
    adapter = record.get("repo_id") or "."  # the folder that the card is in
    shape = record["prompt_format"]
    prompt, added = None, ""
    if example and example["exact"]:
        prompt, added = example["prompt"], example["added"]
    elif shape and shape["exact"] and any(shape["prompt"]):
        prompt, added = "Hello".join(shape["prompt"]), shape["added"]
    rank = saved["rank"] if saved else None
    base_shell, adapter_shell = shlex.quote(base) if base else '"$BASE"', shlex.quote(adapter)
    return {
        "base_shell": base_shell,
        "base_python": json.dumps(base) if base else 'os.environ["BASE"]',
        "adapter_shell": adapter_shell,
        "adapter_python": json.dumps(adapter),
        "name": _name(record),
        "rank": rank,
        "resized_vocabulary": record.get("resized_vocabulary"),
        "engines": [
            {
                "title": engine.title,
                "page": engine.page,
                "port": engine.port,
                "command": engine.command.format(
                    base=base_shell, name=_name(record), adapter=adapter_shell, flags=engine.flags_for(rank)
                ),
            }
            for engine in ENGINES.values()
            if rank and engine.command is not None and engine.flags_for(rank) is not None
        ],
        "rank_above": {
            engine.title: engine.ranks[-1]
            for engine in ENGINES.values()
            if rank and engine.ranks and rank > engine.ranks[-1]
        },
        "dora": _dora_in_engines(),
        "prompt": prompt,
        "request": json.dumps(
            {
                "model": _name(record),
                "prompt": (prompt or "Hello").removeprefix(added),  # engines add it, and twice is another prompt
                "max_tokens": 64,
                "temperature": 0,
            }
        ),
    }


def _dora_in_engines() -> str:
    """What the engines do with a DoRA adapter as it is, in a sentence."""
    (rule,) = (rule for rule in RULES if rule.name == "dora")
    found = {verdict: [name for name in ENGINES if rule.verdict(name) is verdict] for verdict in Verdict}
    others = {Verdict.REFUSES: "refuse it", Verdict.SILENTLY_WRONG: "drop its magnitudes without a word"}
    rest = ", ".join(f"{titles(found[verdict])} {what}" for verdict, what in others.items() if found[verdict])
    if found[Verdict.SERVES]:
        return f"**A DoRA adapter as it is can be served with {titles(found[Verdict.SERVES])} today**; {rest}."
    return f"**No serving engine serves a DoRA adapter as it is today**: {rest}."


def title(record: dict[str, Any]) -> str:
    """The card's heading."""
    what = "Fine-tuned" if _is_whole(record) else f"{_method(record)} adapter for"
    if record["base_model"]:
        return f"{what} {record['base_model']}"
    if record["base_is_quickstart"]:
        return f"{what} the quickstart base of echo_trainer"
    return f"{what} {'' if _is_whole(record) else 'a '}{record['base_model_type']} model"


def last_metrics(history: list[dict[str, Any]], step: int) -> dict[str, Any]:
    """
    The last value of every logged metric, of evaluations up to the step whose weights were saved.

    Args:
        history: what the trainer logged.
        step: that step; an earlier one than the last with `load_best_model_at_end`.
    """
    return {
        key: value
        for entry in history
        for key, value in entry.items()
        if not key.startswith("eval_") or entry.get("step", step) <= step
    }


def mean_loss(history: list[dict[str, Any]], continued_from: int) -> float | None:
    """
    The mean of the logged training loss over the steps of a run; None before it has ended.

    Args:
        history: what the trainer logged. Its `train_loss` is the mean of the steps after a resume.
        continued_from: the step that it was resumed at.
    """
    ends = [entry for entry in history if "train_loss" in entry]
    if not ends:
        return None
    last = ends[-1]["step"]
    parts, before = [(ends[-1]["train_loss"], last - continued_from)], 0
    for entry in history:
        if "loss" in entry and entry["step"] <= continued_from:
            parts.append((entry["loss"], entry["step"] - before))
            before = entry["step"]
    steps = sum(count for _, count in parts)
    return sum(loss * count for loss, count in parts) / steps if steps else ends[-1]["train_loss"]


def _method(record: dict[str, Any]) -> str:
    trained = (record["adapter"] or {}).get("use_dora")
    return record["saved"]["method"] if record["saved"] else "DoRA" if trained else "LoRA"


def _name(record: dict[str, Any]) -> str:
    """A short name for the adapter, as servers address it."""
    return (record.get("repo_id") or "echo-adapter").rpartition("/")[2]


def _result(entry: dict[str, Any]) -> dict[str, Any]:
    metric = str(entry["metric"])
    dataset = {"type": re.sub(r"[^\w./-]+", "-", str(entry["dataset"])), "name": str(entry["dataset"])}
    if entry.get("split"):
        dataset["split"] = entry["split"]
    return {
        "task": {"type": "text-generation", "name": str(entry["task"])},
        "dataset": dataset,
        "metrics": [{"type": _METRICS.get(metric.lower(), metric), "name": metric, "value": entry["value"]}],
    }


def _value(value: Any) -> str:
    """A setting as code, in words where there is none."""
    if value is None:
        return "not set"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"`{text}`"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _seeds(seeds: list[int] | None) -> str:
    if not seeds:
        return "one run"
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)}: {', '.join(map(str, seeds))}"


def _fence(text: str) -> str:
    """A fenced block that no back-tick in the text can end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
