"""What the prompts of a training set look like: what all of them share, and, where that is allowed, an example."""

from itertools import takewhile
from typing import Any

MAX_CHARACTERS = 4000
N_COMPARED = 64
"""Examples that are compared, spread over the training set."""
N_LEAST = 8
"""With fewer, what they share may be their content."""


def prompt_format(dataset: Any, tokenizer: Any) -> dict[str, Any] | None:
    """
    The text around the content: what all prompts begin and end with, and all answers.

    Chat templates, instruction templates and system prompts show up whole, as the model saw them, and nothing that is
    of a single example.

    Args:
        dataset: prepared by `SFTTrainer`: `input_ids` and `labels`, -100 where nothing is to be learnt.
        tokenizer: the one that made them.

    Returns:
        "prompt" and "answer", each a pair of texts (beginning, end; special tokens included; no answer where all are
        the same, since what they share is then what they say), "exact": whether encoding a prompt again without
        special tokens gives the same ids, "added": the text at its beginning that a tokenizer, and so a server,
        writes itself (a beginning-of-sequence token, or nothing), and "n": how many examples were compared. None
        where the data cannot be read twice (streams), or fewer than `N_LEAST` different prompts were found.
    """
    found = [_read(dataset, i, tokenizer) for i in _spread(dataset, tokenizer)]
    rows = [row for row in found if row is not None]
    if len({row["prompt"] for row in rows}) < N_LEAST:
        return None
    parts: dict[str, Any] = {name: _shared([row[name] for row in rows]) for name in ("prompt", "answer")}
    if sum(len(text) for pair in parts.values() for text in pair) > MAX_CHARACTERS:
        return None
    if len({row["answer"] for row in rows}) == 1:
        parts["answer"] = None
    added = rows[0]["added"]
    exact = all(row["exact"] and row["added"] == added for row in rows)
    return {**parts, "exact": exact, "added": added, "n": len(rows)}


def example(dataset: Any, tokenizer: Any) -> dict[str, Any] | None:
    """
    The first training example as the model saw it.

    Returns:
        "prompt" and "answer" (text, special tokens included), "exact" and "added" as of `prompt_format`. None where
        the data cannot be read twice (streams), has no answer, or is too long for a card.
    """
    if not _spread(dataset, tokenizer):
        return None
    row = _read(dataset, 0, tokenizer)
    return None if row is None or len(row["prompt"]) + len(row["answer"]) > MAX_CHARACTERS else row


def _spread(dataset: Any, tokenizer: Any) -> list[int]:
    if not hasattr(dataset, "__len__") or not hasattr(tokenizer, "decode"):
        return []
    n = len(dataset)
    return sorted({i * n // N_COMPARED for i in range(N_COMPARED)}) if n else []


def _read(dataset: Any, index: int, tokenizer: Any) -> dict[str, Any] | None:
    row = dataset[index]
    if row.get("input_ids") is None or row.get("labels") is None:
        return None
    ids, labels = ([int(value) for value in row[name]] for name in ("input_ids", "labels"))  # of any format
    if len(ids) != len(labels):
        return None
    start = next((i for i, label in enumerate(labels) if label != -100), None)
    if not start:
        return None
    end = next((i for i in range(start, len(labels)) if labels[i] == -100), len(labels))
    prompt, answer = tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:end])
    exact = list(tokenizer(prompt, add_special_tokens=False)["input_ids"]) == ids[:start]
    bos = getattr(tokenizer, "bos_token", None) or ""
    doubled = exact and bos and prompt.startswith(bos) and list(tokenizer(prompt)["input_ids"]) != ids[:start]
    return {"prompt": prompt, "answer": answer, "exact": exact, "added": bos if doubled else ""}


def _shared(texts: list[str]) -> tuple[str, str]:
    """What all of these begin with, and what they end with after that."""
    beginning = _common_prefix(texts)
    rests = [text[len(beginning) :][::-1] for text in texts]
    return beginning, _common_prefix(rests)[::-1]


def _common_prefix(texts: list[str]) -> str:
    return "".join(column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*texts, strict=False)))
