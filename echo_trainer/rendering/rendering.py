"""`Rendering`: how the rows of a run become token ids and labels, in training and wherever they come up again."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from transformers import ProcessorMixin
from trl.chat_template_utils import is_chat_template_stop_token_trained
from trl.trainer.utils import global_then_local_main_first

from ..compat.preparation import prepare_rows
from .forms import MISLEADING, Form, RowOptions, check_form, form_of, is_chat
from .mapping import as_dataset, drop_unmarked, map_rows
from .messages import messages_of
from .ready import HOW, Marks, Ready, marks_of, template_of
from .rows import (
    chat_row,
    check_formatted,
    completion_row,
    conversation_row,
    formatted,
    joined_pair,
    marked_row,
    renderer,
    special_words,
    switched_row,
    text_row,
)
from .words import Words, words_of

logger = logging.getLogger(__name__)


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
        return marks_of(self.processing_class)

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
        form, marked = self.form(first), self.marked_options(first)
        apply = partial(map_rows, name=name, num_proc=num_proc)
        with global_then_local_main_first():
            if marked is not None:
                return self._marked(dataset, form, first, marked, apply)
            if self.formatting_func is None:
                check_form(first, form)
                if form is Form.PAIR and is_chat(first):
                    template_of(self.processing_class)  # else TRL's error names neither rows nor options
            if "chat_template_kwargs" in first and form in (Form.CONVERSATION, Form.PAIR):
                dataset = apply(dataset, switched_row, "Reading")
            if form is Form.CONVERSATION:
                return self._conversations(dataset, first, apply)
            if (
                form is Form.PAIR
                and self._joins
                and is_chat(first)
                and (pair := joined_pair(first, 0)) != {name: first[name] for name in pair}
            ):
                dataset = apply(dataset, joined_pair, "Converting", messages=list(pair))
            if form is Form.TOKENS and "completion_mask" in first and not {"labels", "assistant_masks"} & set(first):
                dataset = apply(dataset, completion_row, "Masking", drop=["completion_mask"])
                return Ready(dataset, form, "the tokens of `completion_mask`")
            if self.options.assistant_only_loss and form is not Form.TOKENS:
                return self._pairs_of_turns(dataset, form, first, apply)
        return Ready(dataset, form, HOW.get(form, "not known"), formatting_func=self.formatting_func)

    @property
    def _joins(self) -> bool:
        """Whether messages are written as one text each; processors write parts."""
        return not isinstance(self.processing_class, ProcessorMixin)

    @cached_property
    def words(self) -> Words | None:
        """What the chat template writes around an answer; None where there is no template, or nothing to be found."""
        if getattr(self.processing_class, "chat_template", None) is None:
            return None
        return words_of(renderer({}, self.processing_class), special_words(self.processing_class))

    @property
    def ends(self) -> list[str]:
        """Texts that end an answer and belong to it."""
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        words, marker = self.words, self.options.answer_marker
        own = words is not None and (marker is None or marker.strip() == words.marker.strip())
        return [end for end in (getattr(tokenizer, "eos_token", None), words.end if words and own else None) if end]

    def marked_options(self, row: dict[str, Any]) -> RowOptions | None:
        """
        The options by which the answers of a text are found: those of the run, or the words of the chat template where
        the text holds them; None where no marker says what the answers are.

        Args:
            row: the first of a dataset.
        """
        if self.options.answer_marker is not None:
            return self.options
        if "input_ids" in row or self.options.assistant_only_loss or self.words is None:
            return None
        if self.formatting_func is not None:
            text = formatted(row, 0, self.formatting_func)
        elif form_of(row, self.options) is Form.TEXT:
            text = row[self.options.dataset_text_field]
        else:
            return None
        if not isinstance(text, str) or self.words.marker not in text:
            return None
        if form_of(row, self.options) is Form.CONVERSATION and self.formatting_func is not None:
            messages = messages_of(row, 0, self._joins)
            if renderer(row, self.processing_class)(messages, False).strip() == text.strip():
                return None  # its turns are known
        return replace(self.options, answer_marker=self.words.marker)

    def form(self, row: dict[str, Any]) -> Form:
        """The form of a row; one that a `formatting_func` writes as text is text where a marker finds its answers."""
        if self.formatting_func is not None and "input_ids" not in row and self.marked_options(row) is not None:
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

    def _marked(self, dataset: Any, form: Form, first: dict[str, Any], options: RowOptions, apply: Any) -> Ready:
        if form is not Form.TEXT:
            raise ValueError(
                f"answer_marker={options.answer_marker!r} is looked for in text, and the rows are {form}: they "
                f"have the columns {sorted(first)}. Leave it out, name the column of the text in dataset_text_field, "
                f"or pass a formatting_func that writes a row as text."
            )
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        field = options.dataset_text_field
        if self.formatting_func is not None:
            dataset = apply(dataset, partial(text_row, function=self.formatting_func, field=field), "Formatting")
        if options.drop_without_marker:
            dataset = drop_unmarked(dataset, options, tokenizer, self.ends)
        encode_row = partial(marked_row, options=options, tokenizer=tokenizer, ends=self.ends)
        found = self.options.answer_marker is None
        said = (
            f"The rows are texts that the chat template wrote, so answer_marker={options.answer_marker!r} is set: the "
            f"answers are what follows it."
        )
        how = f"what follows {options.answer_marker!r}"
        return Ready(apply(dataset, encode_row, "Tokenizing"), form, how, said=said if found else "")

    def _conversations(self, dataset: Any, first: dict[str, Any], apply: Any) -> Ready:
        self.require_turns()
        marks = self.marks
        if self.formatting_func is not None:
            check = partial(check_formatted, function=self.formatting_func, processing_class=self.processing_class)
            dataset = apply(dataset, check, "Comparing")
        if "conversations" in first or messages_of(first, 0, self._joins) != first["messages"]:
            drop = [name for name in ("conversations",) if name in first]
            convert = partial(conversation_row, joined=self._joins)
            dataset = apply(dataset, convert, "Converting", drop=drop, messages=["messages"])
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
