"""`Rendering`: how the rows of a run become token ids and labels, in training and wherever they come up again."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import pyarrow
from datasets import Dataset
from trl import get_training_chat_template
from trl.chat_template_utils import has_generation_markers, is_chat_template_stop_token_trained
from trl.trainer.utils import global_then_local_main_first

from ..compat.preparation import prepare_rows
from .forms import MISLEADING, Form, RowOptions, as_messages, form_of, is_chat
from .rows import chat_row, check_formatted, conversation_row, has_marker, marked_row, switched_row, text_row

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ready:
    """
    Rows that TRL can prepare, and what to tell it.

    Attributes:
        dataset: the rows; with `input_ids` and `labels` where TRL cannot make them.
        assistant_only_loss: whether TRL masks all but the assistant's turns.
        chat_template: in place of the tokenizer's; None leaves that.
        formatting_func: what TRL is to apply; None where it was applied already.
        form: of the rows as they were given.
        how: what their answers are, in words.
    """

    dataset: Any
    form: Form
    how: str
    assistant_only_loss: bool = False
    chat_template: str | None = None
    formatting_func: Any = None


@dataclass(frozen=True)
class Marks:
    """Whether a chat template marks the assistant's turns: itself, by a template of TRL's in its place, or not."""

    known: bool
    chat_template: str | None = None
    how: str = "found by rendering each conversation up to its turns"


_HOW = {
    Form.PAIR: "the completion",
    Form.TOKENS: "the tokens that have a label",
    Form.TEXT: "not told from the prompts",
}


class Rendering:
    """
    How rows become token ids and labels.

    Args:
        options: what the run says about its rows.
        processing_class: tokenizer or processor, with its final chat template.
        formatting_func: as given to the trainer.
    """

    def __init__(self, options: RowOptions, processing_class: Any, formatting_func: Any = None):
        self.options = options
        self.processing_class = processing_class
        self.formatting_func = formatting_func

    @cached_property
    def marks(self) -> Marks:
        """How the assistant's turns are told from the rest."""
        template = getattr(self.processing_class, "chat_template", None)
        if template is None:
            raise ValueError(
                "The rows are conversations, and the tokenizer has no chat template to write them as text. Name one "
                "in chat_template_path (a Jinja file, or a model that has one), take the tokenizer of the model's "
                "chat variant, or use rows whose prompt and completion are text."
            )
        if has_generation_markers(template):
            return Marks(True, None, "marked by the chat template")
        try:
            return Marks(True, get_training_chat_template(self.processing_class), "marked by TRL's training template")
        except ValueError:  # TRL has none for this family
            return Marks(False)

    def ready(self, dataset: Any, name: str = "train", num_proc: int | None = None) -> Ready:
        """
        Make rows such that TRL gives them the labels that the options ask for.

        Args:
            dataset: a `Dataset` or `IterableDataset` of raw rows.
            name: of the dataset, for progress bars.
            num_proc: processes that render.

        Raises:
            ValueError: answers cannot be told from prompts; the message names the row.
        """
        first = next(iter(dataset))
        form = self.form(first)
        apply = partial(_map, name=name, num_proc=num_proc)
        with global_then_local_main_first():
            if self.options.answer_marker is not None:
                return self._marked(dataset, form, first, apply)
            if "chat_template_kwargs" in first and form in (Form.CONVERSATION, Form.PAIR):
                dataset = apply(dataset, switched_row, "Reading")
            if form is Form.CONVERSATION:
                return self._conversations(dataset, first, apply)
            if self.options.assistant_only_loss and form is not Form.TOKENS:
                return self._pairs_of_turns(dataset, form, first, apply)
        return Ready(dataset, form, _HOW.get(form, "not known"), formatting_func=self.formatting_func)

    def form(self, row: dict[str, Any]) -> Form:
        """The form of a row; one that a `formatting_func` writes as text is text where a marker finds its answers."""
        if self.formatting_func is not None and self.options.answer_marker is not None and "input_ids" not in row:
            return Form.TEXT
        return form_of(row, self.options)

    def examples(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, list[int]]]:
        """
        `input_ids` and `labels` of each row, as training makes them; nothing is cut off and no row is dropped.

        Raises:
            ValueError: as `ready`, and for rows that a dataset cannot hold side by side.
        """
        options = replace(self.options, drop_without_marker=False)
        rendering = Rendering(options, self.processing_class, self.formatting_func)
        found: dict[int, dict[str, list[int]]] = {}
        forms = [rendering.form(row) for row in rows]
        for form in dict.fromkeys(forms):
            numbers = [number for number, other in enumerate(forms) if other is form]
            ready = rendering.ready(as_dataset([rows[number] for number in numbers]), "given")
            prepared = prepare_rows(
                ready.dataset,
                self.processing_class,
                text_field=options.dataset_text_field,
                assistant_only_loss=ready.assistant_only_loss,
                completion_only_loss=form is Form.PAIR,
                chat_template=ready.chat_template,
            )
            row: Any
            for number, row in zip(numbers, prepared, strict=True):
                found[number] = {name: list(row[name]) for name in ("input_ids", "labels")}
        return [found[number] for number in range(len(rows))]

    def chat_template(self, row: dict[str, Any]) -> str | None:
        """The chat template that messages of a row are written with; None is the tokenizer's own."""
        masked = self.form(row) is Form.CONVERSATION or self.options.assistant_only_loss
        return self.marks.chat_template if masked else None

    def require_turns(self) -> None:
        """
        Refuse conversations whose turns are not to be the answers.

        Raises:
            ValueError: `assistant_only_loss` was set to False by hand.
        """
        if self.options.assistant_only_loss is False:
            raise ValueError(
                "The rows are conversations without a completion, and assistant_only_loss=False trains on all of "
                "their tokens, so no answer is left that an echo could reach. Leave assistant_only_loss out (it is "
                "switched on for such rows) or set it to True, give rows with `prompt` and `completion`, or switch "
                "the echo off with echo_p_start=0 and echo_p_end=0."
            )

    # The forms

    def _marked(self, dataset: Any, form: Form, first: dict[str, Any], apply: Any) -> Ready:
        if form is not Form.TEXT:
            raise ValueError(
                f"answer_marker={self.options.answer_marker!r} is looked for in text, and the rows are {form}: they "
                f"have the columns {sorted(first)}. Leave it out, name the column of the text in dataset_text_field, "
                f"or pass a formatting_func that writes a row as text."
            )
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        field = self.options.dataset_text_field
        if self.formatting_func is not None:
            dataset = apply(dataset, partial(text_row, function=self.formatting_func, field=field), "Formatting")
        if self.options.drop_without_marker:
            before = dataset
            marker = str(self.options.answer_marker)
            dataset = dataset.filter(partial(has_marker, marker=marker, field=field))
            _say_dropped(before, dataset, marker)
        encode_row = partial(marked_row, options=self.options, tokenizer=tokenizer)
        how = f"what follows {self.options.answer_marker!r}"
        return Ready(apply(dataset, encode_row, "Tokenizing"), form, how)

    def _conversations(self, dataset: Any, first: dict[str, Any], apply: Any) -> Ready:
        self.require_turns()
        marks = self.marks
        if self.formatting_func is not None:
            check = partial(check_formatted, function=self.formatting_func, processing_class=self.processing_class)
            dataset = apply(dataset, check, "Comparing")
        if "conversations" in first or as_messages(first["messages"]) != first["messages"]:
            drop = [name for name in ("conversations",) if name in first]
            dataset = apply(dataset, conversation_row, "Converting", drop=drop)
        misleading = [name for name in MISLEADING if name in first]
        dataset = dataset.remove_columns(misleading) if misleading else dataset
        how = f"the assistant's turns, {marks.how}"
        if marks.known:
            self._warn_of_no_end(marks.chat_template)
            return Ready(dataset, Form.CONVERSATION, how, True, marks.chat_template)
        encode_row = partial(chat_row, processing_class=self.processing_class)
        return Ready(apply(dataset, encode_row, "Tokenizing"), Form.CONVERSATION, how)

    def _pairs_of_turns(self, dataset: Any, form: Form, first: dict[str, Any], apply: Any) -> Ready:
        """Prompt and completion, of which only the assistant's turns count."""
        if form is not Form.PAIR or not is_chat(first):
            raise ValueError(
                f"assistant_only_loss=True needs conversations, and the rows are {form}, with the columns "
                f"{sorted(first)}. Leave it out: of prompt and completion the completion is trained on, and of text "
                f"what follows an answer_marker."
            )
        how = f"the assistant's turns of the completion, {self.marks.how}"
        if self.marks.known:
            self._warn_of_no_end(self.marks.chat_template)
            return Ready(dataset, Form.PAIR, how, True, self.marks.chat_template, self.formatting_func)
        encode_row = partial(chat_row, processing_class=self.processing_class)
        return Ready(apply(dataset, encode_row, "Tokenizing"), Form.PAIR, how)

    def _warn_of_no_end(self, chat_template: str | None) -> None:
        if not is_chat_template_stop_token_trained(self.processing_class, chat_template=chat_template):
            logger.warning(
                "The chat template leaves the token that ends the assistant's turn out of {%% generation %%}, so the "
                "model may not learn to stop. Move {%% endgeneration %%} behind that token."
            )


def _map(dataset: Any, function: Any, doing: str, name: str, num_proc: int | None, drop: Sequence[str] = ()) -> Any:
    """Rows changed one by one; `function` gets a row and its number."""
    options: dict[str, Any] = {"with_indices": True, "remove_columns": list(drop) or None}
    if isinstance(dataset, Dataset):
        options |= {"num_proc": num_proc, "desc": f"{doing} {name} dataset"}
    return dataset.map(function, **options)


def _say_dropped(before: Any, after: Any, marker: str) -> None:
    if isinstance(before, Dataset) and len(after) < len(before):
        logger.warning(
            "%d of %d rows do not hold the answer marker %r and are dropped.",
            len(before) - len(after),
            len(before),
            marker,
        )


def as_dataset(rows: Sequence[dict[str, Any]]) -> Dataset:
    """
    Rows as a dataset holds them: a key that one row has and another lacks is None there.

    Raises:
        ValueError: values of one column are of different kinds.
    """
    try:
        return Dataset.from_list(list(rows))
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        raise ValueError(
            f"The rows cannot be held in one dataset, since values of a column are of different kinds ({error}). "
            f"Write nested values, such as `tools`, as JSON text."
        ) from error
