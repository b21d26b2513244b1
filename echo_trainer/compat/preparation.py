"""TRL's preparation of rows without a trainer around it: what `SFTTrainer` trains on, for whoever evaluates it.

Private: `SFTTrainer._prepare_dataset`, and the attributes it reads (`_tokenizer`; `chat_template` and
`completion_only_loss` are public). Seen in trl 1.16 with transformers 5.23 and 5.24. Where it has moved, an error
names what is missing: figures of rows that were rendered in another way would be worse than none.
"""

from types import SimpleNamespace
from typing import Any

from datasets import Dataset
from trl import SFTTrainer


def prepare_rows(
    dataset: Dataset,
    processing_class: Any,
    *,
    text_field: str = "text",
    assistant_only_loss: bool = False,
    completion_only_loss: bool = False,
    chat_template: str | None = None,
) -> Dataset:
    """
    `input_ids` and `labels` of rows as TRL trains on them, none of them cut off.

    Args:
        dataset: rows in a format of TRL.
        processing_class: tokenizer or processor.
        text_field: column of plain text.
        assistant_only_loss, completion_only_loss: as in `SFTConfig`, the latter decided.
        chat_template: in place of that of the tokenizer.
    """
    trainer: Any = SimpleNamespace(
        _tokenizer=getattr(processing_class, "tokenizer", processing_class),
        chat_template=chat_template,
        completion_only_loss=completion_only_loss,
    )
    args: Any = SimpleNamespace(
        dataset_num_proc=None,
        dataset_text_field=text_field,
        assistant_only_loss=assistant_only_loss,
        max_length=None,
        shuffle_dataset=False,
    )
    prepared: Any = SFTTrainer._prepare_dataset(trainer, dataset, processing_class, args, False, None, "given")
    return prepared
