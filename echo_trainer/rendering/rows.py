"""What is done to one row: the functions that datasets map, at the top level so that their results are cached."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from transformers import ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from ..method.segments import IGNORE_INDEX
from .forms import RowOptions, row_name
from .marker import NoMarkerError, marked_spans
from .messages import messages_of, with_text
from .spans import encode
from .turns import Render, turn_spans

Formatting = Callable[[dict[str, Any]], str]


def conversation_row(row: dict[str, Any], number: int, joined: bool = False) -> dict[str, Any]:
    """`messages` in the usual spelling, from `conversations` or from messages in another one."""
    return {"messages": messages_of(row, number, joined)}


def joined_pair(row: dict[str, Any], number: int) -> dict[str, Any]:
    """Prompt and completion whose messages have one text each, in place of parts."""
    return {name: [with_text(message) for message in row[name]] for name in ("prompt", "completion")}


def switched_row(row: dict[str, Any], number: int) -> dict[str, Any]:
    """`chat_template_kwargs` of a row; none where others have some, which TRL takes for a mistake."""
    return {"chat_template_kwargs": row["chat_template_kwargs"] or {}}


def text_row(row: dict[str, Any], number: int, function: Formatting, field: str) -> dict[str, Any]:
    """The text that a `formatting_func` makes of a row, in the column `field`."""
    return {field: formatted(row, number, function)}


def formatted(row: dict[str, Any], number: int, function: Formatting) -> str:
    """
    The text that a `formatting_func` makes of a row.

    Raises:
        ValueError: it returned something else.
    """
    text = function(row)
    if not isinstance(text, str):
        instead = (
            "Rows with other columns are made by dataset.map(formatting_func)."
            if isinstance(text, dict)
            else "Rows in a format of TRL (prompt and completion, messages) need none."
        )
        raise ValueError(
            f"`formatting_func` returned a {type(text).__name__} for row {number}. It is called with one row and must "
            f"return its text. {instead}"
        )
    return text


def has_marker(row: dict[str, Any], options: RowOptions, tokenizer: Any, ends: Sequence[str]) -> bool:
    """Whether the text of a row holds the answer marker, and an answer after it."""
    text = row[options.dataset_text_field]
    if text is None:
        return False
    try:
        marked_spans(with_end(text, tokenizer), options, ends)
    except NoMarkerError:
        return False
    except ValueError:  # said with the row's number when it is tokenised
        return True
    return True


def marked_row(
    row: dict[str, Any], number: int, options: RowOptions, tokenizer: Any, ends: Sequence[str]
) -> dict[str, list[int]]:
    """Token ids and labels of a text with a marker; an end token is appended, as TRL does."""
    given = row[options.dataset_text_field]
    if not isinstance(given, str):
        raise ValueError(
            f"{row_name(number)} has {given!r} in `{options.dataset_text_field}` where a text is needed. Drop such "
            f"rows, or set drop_without_marker=True."
        )
    text = with_end(given, tokenizer)
    return encode(text, marked_spans(text, options, ends, number), tokenizer)


def completion_row(row: dict[str, Any], number: int) -> dict[str, list[int]]:
    """Labels of token ids whose completion is marked by `completion_mask`."""
    ids, mask = row["input_ids"], row["completion_mask"]
    if len(ids) != len(mask):
        raise ValueError(
            f"{row_name(number)} has {len(ids)} `input_ids` and {len(mask)} numbers in `completion_mask`."
        )
    return {"labels": [token if counts else IGNORE_INDEX for token, counts in zip(ids, mask, strict=True)]}


def with_end(text: str, tokenizer: Any) -> str:
    """A text with the tokenizer's end token."""
    end = tokenizer.eos_token or ""
    return text if text.endswith(end) else text + end


def chat_row(row: dict[str, Any], number: int, processing_class: Any) -> dict[str, list[int]]:
    """Token ids and labels of a conversation, or of prompt and completion, whose template marks no turns."""
    prompt = row["prompt"] if "completion" in row else []
    messages = [*prompt, *row["completion"]] if "completion" in row else messages_of(row, number)
    text, spans = turn_spans(messages, renderer(row, processing_class), special_words(processing_class), number)
    return encode_chat(text, spans[_turns(prompt) :], processing_class)


def encode_chat(text: str, spans: list[tuple[int, int]], processing_class: Any) -> dict[str, list[int]]:
    """Token ids and labels of what a chat template wrote; it holds its special tokens already."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    # A processor adds them where the template forgot the first one; a tokenizer never does.
    adds = isinstance(processing_class, ProcessorMixin)
    begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return encode(text, spans, tokenizer, special_tokens=adds and not begins)


def renderer(row: dict[str, Any], processing_class: Any, chat_template: str | None = None) -> Render:
    """What writes messages of a row as text: with its tools and template switches, and with the images' places."""
    tools = row.get("tools")
    options = {
        "chat_template": chat_template,
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **(row.get("chat_template_kwargs") or {}),
    }
    parts = isinstance(processing_class, ProcessorMixin)

    def render(messages: Any, ask: bool) -> str:
        written = prepare_multimodal_messages(list(messages)) if parts else list(messages)
        return processing_class.apply_chat_template(written, tokenize=False, add_generation_prompt=ask, **options)

    return render


def special_words(processing_class: Any) -> list[str]:
    """Texts of the special tokens and of those added to the vocabulary, the longest first."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    return sorted({*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}, key=len, reverse=True)


def check_formatted(row: dict[str, Any], number: int, function: Formatting, processing_class: Any) -> dict[str, Any]:
    """
    The row, once `formatting_func` has written it as the chat template does.

    Raises:
        ValueError: the two texts differ, so the template's turns would not be those of the text.
    """
    text = formatted(row, number, function)
    messages = conversation_row(row, number)["messages"]
    rendered = renderer(row, processing_class)(messages, False)
    if text.strip() != rendered.strip():
        raise ValueError(
            f"{row_name(number)}: `formatting_func` and the chat template write it differently, so nothing says where "
            f"the answers of the text are. The function writes\n{text[:600]!r}\nand the template\n{rendered[:600]!r}\n"
            f"Set answer_marker to what stands before each answer of the text, or leave `formatting_func` out (tools "
            f"and template switches belong into the columns `tools` and `chat_template_kwargs`)."
        )
    return {}


def _turns(messages: list[dict[str, Any]]) -> int:
    """Turns of the assistant."""
    return sum(message["role"] == "assistant" for message in messages)
