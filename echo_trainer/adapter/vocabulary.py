"""The vocabulary that an adapter was trained with, and a base that has it.

Tokens that were added for training have rows in the embedding of the trained model and none in the base that a user
loads. PEFT saves a resized embedding whole; the base must be resized to it before the adapter is loaded. Where none is
saved, the tokenizer beside the adapter says how many rows there have to be.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ..compat.identity import name_of
from .folder import PREFIX, Adapter

logger = logging.getLogger(__name__)


def embedding_names(model: Any) -> tuple[str, ...]:
    """Names of a model's input and output embeddings, as far as it has them."""
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    return tuple(name for name, module in model.named_modules() if any(module is end for end in ends))


def rows_of_config(config: Any) -> int | None:
    """
    The size of the vocabulary that a user finds in the base of a model.

    Args:
        config: of the model in memory, whose vocabulary may have been resized.

    Returns:
        That of the config in the place the base was loaded from; None where it is not on this machine, or has none.
    """
    name = name_of(config)
    if name is None:
        return None
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True).get_text_config().vocab_size
    except (OSError, ValueError, AttributeError):
        return None


def saved_rows(adapter: Adapter, names: tuple[str, ...]) -> int | None:
    """
    Rows of the embeddings that the adapter holds, whole or as LoRA on them.

    Args:
        adapter: its files.
        names: of the embeddings, from `embedding_names`.

    Returns:
        None where it holds none.
    """
    rows = []
    for key, tensor in adapter.tensors.items():
        name = next((name for name in names if key.startswith(f"{PREFIX}{name}.")), None)
        rest = "" if name is None else key.removeprefix(f"{PREFIX}{name}.")
        if rest.startswith("lora_embedding_A"):
            rows.append(tensor.shape[-1])
        elif rest.startswith("lora_B") or (rest.endswith("weight") and "lora_" not in rest):
            rows.append(tensor.shape[0])
    return max(rows, default=None)


def tokens_beside(folder: Path) -> int | None:
    """How many rows the tokenizer in a folder needs: its largest id and one; None where there is none to be read."""
    ids: list[int] = []
    try:
        if (folder / "tokenizer.json").is_file():
            data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
            vocab = data["model"]["vocab"]
            ids += vocab.values() if isinstance(vocab, dict) else range(len(vocab))
            ids += [token["id"] for token in data.get("added_tokens") or []]
        elif (folder / "tokenizer_config.json").is_file():
            data = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
            ids += map(int, data.get("added_tokens_decoder") or {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return max(ids) + 1 if ids else None


def missing_rows(adapter: Adapter, rows: int, names: tuple[str, ...], tied: bool) -> int:
    """
    How many tokens of the training have no embedding in the base or the adapter.

    Args:
        adapter: its files, with the tokenizer of the training.
        rows: of the base's embeddings.
        names: of the base's embeddings.
        tied: whether they share a weight, so that one of them is enough.
    """
    needed = max(saved_rows(adapter, names) or 0, tokens_beside(adapter.home) or 0)
    there = [max(rows, saved_rows(adapter, (name,)) or 0) for name in names] or [rows]
    return max(0, needed - (max(there) if tied else min(there)))


def fit_vocabulary(model: Any, adapter: Adapter) -> int:
    """
    Give a base the rows that an adapter was trained with; new ones are drawn, and overwritten when it is loaded.

    Args:
        model: the base, before the adapter is loaded; it is changed.
        adapter: the adapter's files, with its tokenizer beside them.

    Returns:
        How many rows stay as they were drawn, since the adapter does not hold them.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if getattr(embedding, "weight", None) is None:
        return 0
    names, present = embedding_names(model), embedding.weight.shape[0]
    tied = head is not None and head.weight is embedding.weight
    lost = missing_rows(adapter, present, names, tied)
    rows = saved_rows(adapter, names) or present
    if lost:
        rows = max(rows, tokens_beside(adapter.home) or 0)
    if rows != present:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return lost


def say_lost(adapter: Adapter, lost: int) -> None:
    """Say that embeddings of new tokens were drawn at random, where `fit_vocabulary` had to."""
    if lost:
        logger.warning(
            "%d tokens that '%s' was trained with have no embedding in the base or in the adapter; theirs are random "
            "now. Save the adapter again with model.save_pretrained(OUT, save_embedding_layers=True).",
            lost,
            adapter.home,
        )
