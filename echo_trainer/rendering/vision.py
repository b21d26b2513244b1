"""Images: TRL's collator writes and tokenises the rows; where it cannot tell the answers it gets them in pieces."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from trl.data_utils import prepare_multimodal_messages
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from .forms import Form, RowOptions
from .marker import marked_spans
from .messages import messages_of
from .rendering import Rendering
from .rows import renderer, special_words
from .turns import turn_spans

PIECES = (
    "{% for message in messages %}{% set text = message['content'] | selectattr('type', 'equalto', 'text') | "
    "map(attribute='text') | join %}{% if message['role'] == 'assistant' %}{% generation %}{{ text }}"
    "{% endgeneration %}{% else %}{{ text }}{% endif %}{% endfor %}"
)
"""A chat template that writes texts one after the other and marks those of the assistant."""

COLUMNS = ("tools", "chat_template_kwargs")
"""Columns that change how a conversation is written, which TRL's collator does not read."""


def mark_answers(
    collator: DataCollatorForVisionLanguageModeling, rendering: Rendering, row: dict[str, Any]
) -> Callable:
    """
    A collator that gives labels to the answers of rows with images, from the one that TRL made for them.

    Args:
        collator: it is changed.
        rendering: how the rows are rendered.
        row: one of them.
    """
    form = rendering.form(row)
    marked = form is Form.TEXT and rendering.options.answer_marker is not None
    if form is not Form.CONVERSATION and not marked:
        return collator
    if form is Form.CONVERSATION:
        rendering.require_turns()
    more = [name for name in (*COLUMNS, "conversations") if row.get(name) is not None]
    cut = marked or bool(more) or not rendering.marks.known
    collator.assistant_only_loss = True
    collator.chat_template = PIECES if cut else rendering.marks.chat_template
    return AnswerCollator(collator, rendering.options, cut)


class AnswerCollator:
    """
    TRL's collator, with labels for the answers alone.

    Args:
        collator: with a chat template that marks answers.
        options: what the run says about its rows.
        cut: cut each row into prompts and answers, as text, which the template `PIECES` puts together and marks.
    """

    def __init__(self, collator: DataCollatorForVisionLanguageModeling, options: RowOptions, cut: bool):
        self.collator = collator
        self.options = options
        self.cut = cut

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """What TRL's collator makes of the rows."""
        rows = [self.pieces(example) if self.cut else dict(example) for example in examples]
        try:
            return self.collator([dict(row) for row in rows])
        except ValueError as error:
            if "text_replacement_offsets" not in str(error):
                raise
        # Idefics3's processor (SmolVLM) wants tensors of places in the text, which are none.
        late: Any = LateTensors(self.collator.processor)
        self.collator.processor = late
        return self.collator(rows)

    def pieces(self, example: dict[str, Any]) -> dict[str, Any]:
        """A row of the same text and images, as messages that `PIECES` writes."""
        processor = self.collator.processor
        images = list(example["images"]) if example.get("images") is not None else [example["image"]]
        if self.options.answer_marker is not None and self.options.dataset_text_field in example:
            text = example[self.options.dataset_text_field]
            spans = marked_spans(text, self.options, [processor.tokenizer.eos_token])
            pictures = [{"type": "image", "image": image} for image in images]
        else:
            messages = prepare_multimodal_messages(_with_places(messages_of(example), processor), images=images)
            text, spans = turn_spans(messages, renderer(example, processor), special_words(processor))
            contents = [part for message in messages for part in message.get("content") or []]
            pictures = [part for part in contents if part["type"] != "text"]
        cuts = [0, *(place for span in spans for place in span), len(text)]
        written = [
            {
                "role": "assistant" if i % 2 else "user",
                "content": [*(pictures if i == 0 else []), {"type": "text", "text": text[begin:end]}],
            }
            for i, (begin, end) in enumerate(pairwise(cuts))
        ]
        return {"messages": written, "images": []}


def _with_places(messages: list[dict[str, Any]], processor: Any) -> list[dict[str, Any]]:
    """Messages in which the image token, where it stands in a text, is the place of an image."""
    token = getattr(processor, "image_token", None)
    if not token or not any(
        token in message["content"] for message in messages if isinstance(message.get("content"), str)
    ):
        return messages
    placed = []
    for message in messages:
        first, *rest = message["content"].split(token)
        parts = [{"type": "text", "text": first}] if first.strip() else []
        for text in rest:
            parts += [{"type": "image"}, {"type": "text", "text": text.lstrip("\n")}]
        placed.append({**message, "content": parts})
    return placed


class LateTensors:
    """A processor whose chat template gives tensors only once the answers are marked."""

    def __init__(self, processor: Any):
        self.processor = processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)

    def apply_chat_template(self, *args: Any, return_tensors: str | None = None, **kwargs: Any) -> Any:
        """That of the processor."""
        output = self.processor.apply_chat_template(*args, return_tensors=None, **kwargs)
        return output if return_tensors is None else output.convert_to_tensors(return_tensors)
