"""The model card, rendered from the record of a run with the Jinja template `model_cards/adapter.md.j2`."""

import json
from typing import Any

import jinja2

from .resources import resource_folder

TEMPLATE = "adapter.md.j2"


def render_card(record: dict[str, Any], curves: list[str]) -> str:
    """
    Model card of an adapter, in Markdown with YAML metadata.

    Args:
        record: what `run_record` returned.
        curves: pictures to show, as paths relative to the card.

    Raises:
        jinja2.UndefinedError: the record lacks something the template shows; a card is never left with a gap.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(resource_folder("model_cards")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["json"] = json.dumps
    last = _last_metrics(record["metrics"])
    evaluation = {name: value for name, value in last.items() if name.startswith("eval_")}
    return environment.get_template(TEMPLATE).render(run=record, curves=curves, last=last, evaluation=evaluation)


def _last_metrics(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The last value of every logged metric."""
    return {key: value for entry in history for key, value in entry.items()}
