"""Writing an adapter so that whoever looks finds the old one or the new one, never a mixture."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .folder import CONFIG_NAME, WEIGHTS_NAME

TOKENIZER = ("tokenizer*", "special_tokens_map.json", "chat_template.jinja", "vocab.json", "merges.txt",
             "added_tokens.json")  # fmt: skip
RECORD = ("echo_run.json", "assets")  # of the run: true of weights made from the trained ones as well
BESIDES = ("README.md", ".eval_results", *RECORD, *TOKENIZER)  # true of these weights alone


def write_adapter(source: Path, out: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    """
    Write config and tensors to `out`, which may be `source` itself; card, tokenizer and the like come along.

    Returns:
        `out`.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=".portable-", dir=out if out.is_dir() else out.parent))
    try:
        new = stage / "new"
        new.mkdir()
        save_file(tensors, new / WEIGHTS_NAME, metadata={"format": "pt"})
        (new / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if not out.is_dir():
            copy_besides(source, new)
            new.rename(out)
        else:
            if out.resolve() != source.resolve():
                copy_besides(source, out)
            _swap(new, out, stage / "old")
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return out


def copy_besides(source: Path, out: Path, patterns: tuple[str, ...] = BESIDES) -> None:
    """Copy what belongs beside an adapter or a model: the card and the tokenizer, no checkpoints, no weights."""
    for path in (path for pattern in patterns for path in source.glob(pattern)):
        if path.is_dir():
            shutil.copytree(path, out / path.name, dirs_exist_ok=True)
        else:
            shutil.copy2(path, out / path.name)


def _swap(new: Path, out: Path, old: Path) -> None:
    """Put the two files of ``new`` in the place of those in ``out``, or put the old ones back.

    The config goes first and comes back last: whoever looks in between finds no adapter, never a mixed one.
    """
    old.mkdir()
    present = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if (out / name).exists()]
    try:
        for name in present:
            os.replace(out / name, old / name)
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            os.replace(new / name, out / name)
    except BaseException:
        for name in reversed(present):
            if (old / name).exists():
                os.replace(old / name, out / name)
        raise
