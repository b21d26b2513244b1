"""Samples for layer selection: rows of a dataset -> token ids -> padded batches.

A row is one of
    {"prompt": ..., "completion": ...}   both strings, or both lists of messages
    {"messages": [...]}                  a conversation, also {"conversations": [...]}
    {"text": ...}                        plain text, with an optional "text_pair" for an encoder
    {"input_ids": [...]}                 already tokenised, with optional "attention_mask" and "token_type_ids"
and may carry "tools", "chat_template_kwargs", and "images" (or "image") when `processing_class` is a processor. A
plain string counts as "text".
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor
from trl.data_utils import prepare_multimodal_messages

from ..rendering.messages import messages_of
from ..rendering.rendering import Rendering
from ..rendering.rows import renderer

Sample = dict[str, Tensor]

_FORMATS = '{"prompt", "completion"}, {"messages"}, {"text"} or {"input_ids"}'
# one value per token, so padded; everything else of a sample is stacked along its first dimension
_PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


def draw_rows(dataset: Any, n_samples: int, seed: int) -> list[Any]:
    """At most `n_samples` rows: drawn without replacement by `seed`, in dataset order; the first ones of a stream.

    Raises:
        ValueError: a `DatasetDict`, something that cannot be read row by row, or fewer than 4 rows.
    """
    if isinstance(dataset, Mapping):
        raise ValueError(
            f"dataset is a mapping with the keys {sorted(map(str, dataset))}, so it is not clear which rows to read; "
            'pass one split, for example dataset["train"]'
        )
    if not isinstance(dataset, Iterable):
        raise ValueError(f"dataset is a {type(dataset).__name__}, which has no rows; pass a Dataset or a list of rows")
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        table = cast("Sequence[Any]", dataset)
        order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))[:n_samples]
        rows = [table[i] for i in order.sort().values.tolist()]
    else:
        rows = list(islice(dataset, n_samples))
    if len(rows) < 4:
        raise ValueError(
            f"layer selection got {len(rows)} samples (n_samples={n_samples}), but CKA needs at least 4 and is only "
            "steady from about 64; the published setting is n_samples=128"
        )
    return rows


def encode_rows(
    rows: Sequence[Any], processing_class: Any, max_length: int | None, rendering: Rendering | None = None
) -> list[Sample]:
    """Samples of rows: as `encode_row` makes them, or as training does, where a rendering is given.

    Raises:
        ValueError: as `encode_row`, and as `Rendering.examples`.
    """
    if rendering is None or any(_images(row) for row in rows):
        return [encode_row(row, processing_class, max_length) for row in rows]
    return [encode_row(example, None, max_length) for example in rendering.examples(rows)]


def encode_row(row: Any, processing_class: Any, max_length: int | None) -> Sample:
    """Token ids (1, T) of one row, with its attention mask and, for a processor, the pixels.

    Padding inside a tokenised row is cut off on either side; text longer than `max_length` is cut at its end, text
    with images never (an image token would be lost).

    Raises:
        ValueError: an unknown row format, text without a tokenizer, a conversation without a chat template, no token.
    """
    sample = _encode(row, processing_class, max_length)
    if not sample["attention_mask"].any():
        raise ValueError(f"a row gives no token at all, so it has no representation: {str(row)[:80]}; drop empty rows")
    return sample


def _encode(row: Any, processing_class: Any, max_length: int | None) -> Sample:
    if isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, Mapping):
        raise ValueError(f"a row of the dataset is a {type(row).__name__}; write rows as {_FORMATS}")
    if row.get("input_ids") is not None:
        return _trim(row, max_length)
    if processing_class is None:
        raise ValueError(
            f"the dataset has the columns {sorted(row)}, which are text, and no tokenizer was given; pass "
            "processing_class=AutoTokenizer.from_pretrained(...), or tokenise the rows into input_ids"
        )
    images = _images(row)
    text, pair, templated = _text(row, processing_class, images)
    # a template writes its own special tokens; adding them again would give two beginnings
    options = {"add_special_tokens": not templated, "return_tensors": "pt"}
    if images:
        return dict(processing_class(text=[text], images=[images], **options))
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if max_length is not None:
        options |= {"truncation": True, "max_length": max_length}
    return dict(tokenizer([text], [pair] if pair is not None else None, **options))


def _trim(row: Mapping, max_length: int | None) -> Sample:
    ids = torch.as_tensor(row["input_ids"]).reshape(-1)
    mask = torch.as_tensor(row["attention_mask"]).reshape(-1) if row.get("attention_mask") is not None else None
    real = torch.ones_like(ids) if mask is None else mask
    kept = real.nonzero().squeeze(-1)
    span = slice(int(kept[0]), int(kept[-1]) + 1) if len(kept) else slice(0)
    sample = {"input_ids": ids[span], "attention_mask": real[span]}
    if row.get("token_type_ids") is not None:
        sample["token_type_ids"] = torch.as_tensor(row["token_type_ids"]).reshape(-1)[span]
    sample = {name: value[:max_length][None] for name, value in sample.items()}
    if row.get("pixel_values") is not None:
        pixels = torch.as_tensor(row["pixel_values"])
        sample["pixel_values"] = pixels[None] if pixels.ndim == 3 else pixels
    return sample


def _images(row: Mapping) -> list[Any]:
    images = row["images"] if row.get("images") is not None else row.get("image")
    if images is None:
        return []
    return list(images) if isinstance(images, Sequence) else [images]


def _text(row: Mapping, processing_class: Any, images: list[Any]) -> tuple[str, str | None, bool]:
    """Text, second text of an encoder's pair, and whether a chat template wrote it."""
    if row.get("messages") is not None or row.get("conversations") is not None:
        messages = messages_of(dict(row))
    elif row.get("prompt") is not None and row.get("completion") is not None:
        if isinstance(row["prompt"], str) and isinstance(row["completion"], str):
            return row["prompt"] + row["completion"], None, False
        if isinstance(row["prompt"], str) or isinstance(row["completion"], str):
            raise ValueError("a row has a conversation on one side and a string on the other; make both the same kind")
        messages = [*row["prompt"], *row["completion"]]
    elif row.get("text") is not None:
        return row["text"], row.get("text_pair"), False
    else:
        raise ValueError(
            f"the dataset has the columns {sorted(row)}, none of the known formats; rename or map them to {_FORMATS}"
        )
    if hasattr(processing_class, "tokenizer"):  # a processor's template wants structured contents
        messages = prepare_multimodal_messages(messages, images)
    if not getattr(processing_class, "chat_template", None):
        raise ValueError(
            f"the rows are conversations, but {type(processing_class).__name__} has no chat template to write them "
            "with; set its chat_template, or use rows with string prompt and completion"
        )
    return renderer(dict(row), processing_class)(messages, False), None, True


def make_batches(samples: Sequence[Sample], batch_size: int, pad_token_id: int) -> list[Sample]:
    """Batches padded on the right, longest samples first (the batch that needs most memory fails at once, if any).

    Right padding keeps absolute positions right in every model; the order of the samples means nothing to CKA.

    Raises:
        ValueError: batch_size below 1, or samples whose images have different shapes.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} gives no batches; use 1 or more")
    ordered = sorted(samples, key=lambda sample: -sample["input_ids"].shape[-1])
    return [_stack(ordered[i : i + batch_size], pad_token_id) for i in range(0, len(ordered), batch_size)]


def _stack(samples: Sequence[Sample], pad_token_id: int) -> Sample:
    longest = max(sample["input_ids"].shape[-1] for sample in samples)
    batch = {}
    for name in samples[0]:
        values = [sample[name] for sample in samples if name in sample]
        if name in _PER_TOKEN:
            fill = pad_token_id if name == "input_ids" else 0
            values = [torch.nn.functional.pad(v, (0, longest - v.shape[-1]), value=fill) for v in values]
        if len(values) != len(samples) or len({v.shape[1:] for v in values}) > 1:
            raise ValueError(
                f"the samples of a batch have different {name} (shapes {sorted({tuple(v.shape) for v in values})} for "
                f"{len(samples)} samples), so they cannot be stacked; use batch_size=1"
            )
        batch[name] = torch.cat(values)
    return batch
