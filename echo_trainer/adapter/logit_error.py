"""How far a model's logits are from those of base + adapter in PEFT, float32.

Shapes: B rows, T tokens, V vocabulary. Token ids are (B, T), logits (B, T, V).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ..compat.building import load_model
from ..compat.identity import name_of
from .base import read_base
from .folder import Adapter, AdapterError
from .read import read_adapter
from .refuse import ExportError, refuse_broken, refuse_partly_loaded
from .vocabulary import fit_vocabulary, say_lost

MERGE_TOLERANCE = 1e-3  # of the largest logit: float32 rounding stays a hundred times below it


@dataclass(frozen=True)
class LogitError:
    """How far the exported model's logits are from those of base + adapter in PEFT, float32.

    Attributes:
        largest: max |exported - original|.
        mean: mean |exported - original|.
        effect: mean |original - base|, what the adapter changes. An error far below it is harmless.
        same_top: share of positions where the most probable token is the same.
        positions: how many positions were compared.

    """

    largest: float
    mean: float
    effect: float
    same_top: float
    positions: int

    def __str__(self) -> str:
        share = f"{self.mean / self.effect:.2g} of what the adapter changes" if self.effect else "the adapter is zero"
        return (
            f"logit error: largest {self.largest:.2g}, mean {self.mean:.2g} ({share}); "
            f"same top token at {self.same_top:.1%} of {self.positions} positions"
        )


def probe_ids(config: Any, rows: int = 4, length: int = 64) -> torch.Tensor:
    """
    The token sequences that errors are measured on: (rows, length), the same ones every time.

    Args:
        config: of the model. Tokens that it gives a meaning to, such as the place of an image, are not among them.
        rows, length: how many, and of how many tokens; fewer where the model has fewer positions.
    """
    text = config.get_text_config()
    length = min(length, getattr(text, "max_position_embeddings", None) or length)
    ids = torch.randint(0, text.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    marks = (
        {value for name, value in vars(config).items() if name.endswith(("_token_id", "_token_index")) and value}
        if text is not config
        else set()
    )
    plain = next((token for token in range(text.vocab_size) if token not in marks), 0)
    for mark in marks:
        ids[ids == mark] = plain
    return ids


def reference(adapter: str | Path, base: str | Path | None) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """
    Logits of base + adapter, logits of the base, and the model; all in float32.

    Raises:
        AdapterError: the adapter is broken, or does not fit the base.
    """
    files, name = read_adapter(adapter), base_name(adapter, base)
    refuse_broken(files, read_base(name, download=True))  # before the base is loaded, which takes long
    model = with_adapter(load_base(name), files, autocast_adapter_dtype=False).float()
    ids = probe_ids(model.config)
    try:
        original = logits_of(model, ids)
    except (ValueError, RuntimeError, TypeError, IndexError, AttributeError) as error:
        raise ExportError(f"PEFT loads '{adapter}' on the base {name}, but the model that comes out cannot be run: "
                          f"{_in_a_line(error)} Train it in a way that PEFT can run.") from error  # fmt: skip
    with model.disable_adapter():
        plain = logits_of(model, ids)
    return original, plain, model


def base_name(adapter: str | Path, base: str | Path | None) -> str:
    """The base's name: given, or from the adapter's config."""
    name = base or read_adapter(adapter).config.get("base_model_name_or_path")
    if not name:
        raise AdapterError(f"'{adapter}' does not name its base model. Give it: --base BASE.")
    return str(name)


def load_base(name: str | Path) -> Any:
    """A model in float32, ready for inference."""
    try:
        return load_model(str(name), dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        raise AdapterError(f"The base model '{name}' cannot be loaded ({str(error).splitlines()[0]}). Give the base "
                           f"that the adapter was trained on: --base BASE.") from error  # fmt: skip


def with_adapter(model: Any, adapter: Adapter, **options: Any) -> Any:
    """
    ``model`` with the adapter, all of it, ready for inference.

    Args:
        model: the base; its vocabulary is resized to that of the training.
        adapter: the adapter's files.
        options: of ``PeftModel.from_pretrained``.

    Raises:
        AdapterError: PEFT cannot load it, or loads only a part of the file.
    """
    say_lost(adapter, fit_vocabulary(model, adapter))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # looked at below
            model = PeftModel.from_pretrained(model, adapter.folder, **options)
            # Once more, since only this call says which keys of the file found their place.
            loaded = model.load_adapter(adapter.folder, "default", **options)
    except (RuntimeError, ValueError, KeyError) as error:
        base = name_of(model.config) or "this base"
        raise AdapterError(f"PEFT cannot load '{adapter.folder}' on {base}: {_in_a_line(error)} Give the base that "
                           f"the adapter was trained on, or save the adapter again.") from error  # fmt: skip
    # Prompts have their own way into the model, so all of them are called unexpected.
    unexpected = [] if model.active_peft_config.is_prompt_learning else loaded.unexpected_keys
    refuse_partly_loaded(adapter, model, loaded.missing_keys, unexpected)
    return model.eval()


def _in_a_line(error: Exception) -> str:
    """PEFT's error without the tens of lines that name every tensor."""
    if isinstance(error, KeyError):
        return f"the file has no tensor {error}, which the config announces."
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    wrong = [line for line in lines if line.startswith("size mismatch")] or lines[:1]
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return f"{wrong[0] if wrong else type(error).__name__}{more}."


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits (B, T, V) at every position, without gradient."""
    with torch.no_grad():
        return model.eval()(input_ids=ids.to(model.device)).logits


def require_equal(got: torch.Tensor, expected: torch.Tensor, after: str) -> None:
    """Stop with `ExportError` unless the logits are equal up to float32 rounding."""
    difference = (got - expected).abs().max().item()
    if not difference <= MERGE_TOLERANCE * max(1.0, expected.abs().max().item()):  # also when it is NaN
        raise ExportError(
            f"After {after}, logits differ by {difference:.3g}, more than rounding explains. The adapter or the base "
            f"may hold NaN, or its method may not be mergeable."
        )


def logit_error(exported: torch.Tensor, original: torch.Tensor, plain: torch.Tensor) -> LogitError:
    """Compare exported logits with the original ones and with those of the base alone, all (B, T, V)."""
    difference = (exported - original).abs()
    same = (exported.argmax(-1) == original.argmax(-1)).float().mean().item()
    effect = (original - plain).abs().mean().item()
    return LogitError(difference.max().item(), difference.mean().item(), effect, same, original[..., 0].numel())
