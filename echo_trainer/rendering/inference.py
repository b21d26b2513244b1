"""The prompt as training writes it beside the prompt as inference writes it, and whether the end is learned."""

from collections.abc import Collection
from typing import Any

from jinja2 import TemplateError
from trl.data_utils import common_prefix_length

from ..method.segments import IGNORE_INDEX
from ..quiet import quiet_libraries
from .forms import Form, RowOptions, is_chat
from .marker import marked_spans
from .messages import messages_of
from .rendering import Rendering
from .rows import formatted, renderer

_SHOWN = 300
"""Characters of a text that a message shows, from the end."""


def disagreements(row: dict[str, Any], rendering: Rendering, stops: Collection[int]) -> list[str]:
    """
    What training teaches about the last answer of a row that inference will not ask for.

    Args:
        row: a raw row, of text.
        rendering: of the run.
        stops: token ids at which generation ends; none where that is not known.

    Returns:
        Sentences: one where the prompts differ, token by token, with both texts, and one where no token that ends
        generation is learned. Nothing for rows that are tokens already, or text whose answers nobody knows.
    """
    form, marked = rendering.form(row), rendering.marked_options(row)
    if form in (Form.TOKENS, Form.OTHER) or (form is Form.TEXT and marked is None):
        return []
    if rendering.formatting_func is not None and form is Form.PAIR:  # what writes the prompt in use is not known
        return []
    with quiet_libraries():  # what is to be said of the rows was said when they were prepared
        (example,) = rendering.examples([row])
    ids, labels = example["input_ids"], example["labels"]
    learned = [place for place, label in enumerate(labels) if label != IGNORE_INDEX]
    if not learned:
        return []
    several = form is not Form.PAIR or bool(rendering.options.assistant_only_loss)
    start = _last_run(learned) if several else learned[0]
    tokenizer = getattr(rendering.processing_class, "tokenizer", rendering.processing_class)
    said = []
    try:
        asked = _asked_text(row, rendering, marked, tokenizer) if marked else _asked(row, form, rendering, tokenizer)
    except TemplateError as error:
        said.append(f"The chat template cannot write the prompt of the first row for inference: {error}")
    else:
        if asked != ids[:start]:
            said.append(_differ(ids[:start], asked, tokenizer))
    end = [ids[place] for place in learned if place >= start]
    if stops and not set(end) & set(stops):
        said.append(
            f"The answer of the first row ends in {tokenizer.decode(end[-8:])!r}, and generation stops at "
            f"{' or '.join(repr(tokenizer.decode([stop])) for stop in sorted(stops))}, which is not in the loss: the "
            f"model may not learn to stop. Give answers an end token: a chat template that writes one inside the "
            f"assistant's turn, or the template's own end of turn as `eos_token`."
        )
    return said


def without_chat_template(row: dict[str, Any], rendering: Rendering) -> list[str]:
    """A sentence where rows of text are trained as they stand, for a model that has a chat template; else nothing."""
    template = getattr(rendering.processing_class, "chat_template", None)
    if template is None or rendering.form(row) is not Form.PAIR or is_chat(row):
        return []
    return [
        "The model has a chat template, and the rows are taken as they stand, without it. If it will be asked through "
        "that template (a chat endpoint, `apply_chat_template`), write `dataset_template: chat`, or rows of messages."
    ]


def _last_run(places: list[int]) -> int:
    """Where the last run of neighbouring places begins."""
    start = places[-1]
    for place in reversed(places):
        if start - place > 1:
            break
        start = place
    return start


def _asked(row: dict[str, Any], form: Form, rendering: Rendering, tokenizer: Any) -> list[int]:
    """Tokens of the prompt of the last answer, as one who uses the model writes it."""
    options = rendering.options
    if form is Form.PAIR and not is_chat(row):
        return tokenizer(row["prompt"])["input_ids"]
    if form is Form.PAIR:
        turns = [*row["prompt"], *row["completion"]] if options.assistant_only_loss else row["prompt"]
    else:
        turns = messages_of(row)
    if form is not Form.PAIR or options.assistant_only_loss:
        turns = turns[: max(place for place, turn in enumerate(turns) if turn["role"] == "assistant")]
    text = renderer(row, rendering.processing_class)(turns, True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _asked_text(row: dict[str, Any], rendering: Rendering, marked: RowOptions, tokenizer: Any) -> list[int]:
    """The text up to its last answer, as tokens: of a chat template's text as the template gives it to a model."""
    function = rendering.formatting_func
    text = row[marked.dataset_text_field] if function is None else formatted(row, 0, function)
    start, _ = marked_spans(text, marked, rendering.ends)[-1]
    from_template = rendering.options.answer_marker is None
    return tokenizer(text[:start], add_special_tokens=not from_template)["input_ids"]


def _differ(trained: list[int], asked: list[int], tokenizer: Any) -> str:
    first = common_prefix_length(trained, asked)
    texts = [tokenizer.decode(ids)[-_SHOWN:] for ids in (trained, asked)]
    same = " (the texts are equal, the tokens are not)" if texts[0] == texts[1] else ""
    return (
        f"The first row's prompt is written differently in training and in use, from token {first} on{same}. Training "
        f"writes {len(trained)} tokens:\n{texts[0]!r}\nand whoever asks the model, with add_generation_prompt=True "
        f"where there is a chat template, {len(asked)}:\n{texts[1]!r}\nThe model will answer a prompt that it was not "
        f"trained on. Mend the chat template or the rows such that both are equal."
    )
