"""The rows of a run: how they get their labels, decided by ourselves in place of TRL, and said once."""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from typing import Any

from datasets import Dataset
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from ..config import EchoSFTConfig
from ..method.soft_labels import TOP_LOGS, TOP_TOKENS
from ..rendering.forms import Form, RowOptions
from ..rendering.inference import disagreements
from ..rendering.messages import messages_of
from ..rendering.rendering import Rendering
from ..rendering.turns import no_answer
from ..rendering.vision import COLUMNS, mark_answers
from .validation import warn_of_lost_answers

logger = logging.getLogger(__name__)


class Rows:
    """
    The rows of a run.

    Args:
        config: of the trainer.
        formatting_func: as given to it.
    """

    def __init__(self, config: EchoSFTConfig, formatting_func: Callable | None = None):
        config.forget_what_was_switched_on()
        self.config = config
        self.options = RowOptions.of(config)
        self.formatting_func = formatting_func
        self.rendering: Rendering | None = None
        self.how: str | None = None
        self.first: Any = None  # raw row of the training data, until it was looked at
        self.columns = (*COLUMNS, "conversations", config.dataset_text_field) if self.ours else ()
        self.columns += (TOP_TOKENS, TOP_LOGS)

    @property
    def ours(self) -> bool:
        """
        Whether it is for us to say what the answers are: with an echo, and where an option asks for answers.

        With the echo off and no such option the rows are TRL's alone.
        """
        asked = self.options.answer_marker is not None or bool(self.options.assistant_only_loss)
        return self.config.echo_enabled or asked

    @contextmanager
    def kept_from_trl(self, call: dict[str, Any]) -> Iterator[None]:
        """
        TRL does not look for answers inside; it would refuse templates and rows that get their labels here.

        Args:
            call: arguments of the trainer.

        Raises:
            ValueError: a dataset is empty.
        """
        if self.options.answer_marker is not None:
            call["formatting_func"] = None  # applied here; TRL refuses it beside the columns prompt and completion
        if self.ours:
            self.config.assistant_only_loss = None
        try:
            yield
        except StopIteration as error:  # TRL asks for the first row
            raise ValueError(f"{_empty(call)} has no row at all.") from error
        finally:
            if self.config.assistant_only_loss is None:
                self.config.assistant_only_loss = self.options.assistant_only_loss

    def prepare(
        self,
        prepare: Callable[..., Any],
        host: Any,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Callable | None,
        dataset_name: str,
    ) -> Any:
        """
        A dataset with `input_ids` and `labels`.

        Args:
            prepare: TRL's preparation.
            host: the trainer, which is told the chat template.
            dataset, processing_class, args, packing, formatting_func, dataset_name: as TRL gives them.
        """
        if self.ours and not (isinstance(dataset, Dataset) and dataset.format["type"] == "custom"):
            self.first = next(iter(dataset)) if dataset_name == "train" else self.first
            ready = self.renders(processing_class).ready(dataset, dataset_name, args.dataset_num_proc)
            dataset, formatting_func = ready.dataset, ready.formatting_func
            host.chat_template = ready.chat_template
            args = copy.copy(args)
            args.assistant_only_loss = ready.assistant_only_loss
            self._note(ready.how, ready.form, ready.said)
        try:
            prepared = prepare(dataset, processing_class, args, packing, formatting_func, dataset_name)
        # What TRL and chat templates raise of a conversation without an answer.
        except (RuntimeError, ValueError, TypeError, LookupError) as error:
            row: Any
            for number, row in enumerate(dataset if args.assistant_only_loss else ()):
                if "messages" in row and not any(m["role"] == "assistant" for m in messages_of(row, number)):
                    raise no_answer(row["messages"], number) from error
            raise
        if not packing and isinstance(dataset, Dataset):
            warn_of_lost_answers(dataset_name, len(dataset), len(prepared), args.max_length)
        return prepared

    def record(self) -> dict[str, Any]:
        """What whoever evaluates the adapter must know to render rows as they were trained on; JSON values."""
        return {"answers": self.how, **asdict(self.options)}

    def compare_with_inference(self, model: Any) -> None:
        """
        Say once where the first row's prompt is another in training than in use, or its answer's end is not learned.

        Args:
            model: to be trained; its generation config says where generation stops.
        """
        row, self.first = self.first, None
        if row is None or self.rendering is None:
            return
        tokenizer = getattr(self.rendering.processing_class, "tokenizer", self.rendering.processing_class)
        ends = getattr(model.generation_config, "eos_token_id", None)
        ends = [*ends] if isinstance(ends, list | tuple) else [ends]
        stops = {end for end in (*ends, tokenizer.eos_token_id) if end is not None}
        for sentence in disagreements(row, self.rendering, stops):
            logger.warning("%s", sentence)

    def collator(self, collator: Any, processing_class: Any, dataset: Any) -> Any:
        """The collator of a run whose rows hold images: TRL's, which writes and tokenises them, told their answers."""
        if not self.ours or not isinstance(collator, DataCollatorForVisionLanguageModeling):
            return collator
        rendering, row = self.renders(processing_class), next(iter(dataset))
        ready = mark_answers(collator, rendering, row)
        if rendering.form(row) is Form.CONVERSATION:
            self._note(f"the assistant's turns, {rendering.marks.how}", Form.CONVERSATION)
        return ready

    def renders(self, processing_class: Any) -> Rendering:
        """How rows are written with a tokenizer or processor."""
        if self.rendering is None or self.rendering.processing_class is not processing_class:
            self.rendering = Rendering(self.options, processing_class, self.formatting_func)
        return self.rendering

    def _note(self, how: str, form: Form, said: str = "") -> None:
        """Note what the answers of the first dataset are, and say where an option was switched on for it."""
        if self.how is not None:
            return
        self.how = how
        if said:
            logger.warning("%s", said)
        if form is Form.CONVERSATION and self.options.assistant_only_loss is None:
            self.config.switch_on_assistant_only_loss()
            logger.warning(
                "The rows are conversations without a completion, so assistant_only_loss=True is set: the answers are "
                "%s.",
                how,
            )


def _empty(call: dict[str, Any]) -> str:
    """Which dataset of a trainer has no rows, in words."""
    evaluated = call.get("eval_dataset")
    several = evaluated if isinstance(evaluated, dict) else {"": evaluated}
    named = {"The training dataset": call.get("train_dataset")}
    named |= {
        f"The evaluation dataset {name!r}" if name else "The evaluation dataset": d for name, d in several.items()
    }
    return next((name for name, dataset in named.items() if not _first_rows(dataset)), "A dataset")


def _first_rows(dataset: Any) -> list[Any]:
    return list(islice(dataset, 1)) if dataset is not None else [None]
