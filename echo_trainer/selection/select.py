"""Choose the layers worth adapting: those that change the representation most (CKA layer selection).

    importance_i = 1 - CKA(R_{i-1}, R_i),  i = 1..L,  on the frozen model;  the N = floor(ratio L) highest are chosen

    R_i  representation after layer i, one row per sample (R_0 = embedding output)      L  number of layers
    CKA  linear, biased as published or debiased (cka.py)                               N  number of chosen layers

Source: "Layer-wise LoRA fine-tuning: a similarity metric approach", arXiv 2602.05988. Beyond it: the sample-space form
(n^2 d instead of n d^2), the debiased CKA, and a bootstrap over the samples, which says how far each choice can be
trusted. Layers are counted from 0 here and in PEFT; "layer 1" of the paper is layer 0.

    dataset -> samples -> representations -> cka -> select -> use, lora_config, plot
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..compat.identity import name_of
from ..passes.modules import base_model_of
from ..rendering.rendering import Rendering
from .cka import consecutive_cka, is_constant
from .lora_config import lora_config_kwargs
from .plot import plot_selection
from .representations import POOLINGS, collect_representations, find_blocks, is_encoder, refuse_shards
from .samples import draw_rows, encode_rows, make_batches


@dataclass
class LayerSelection:
    """The chosen layers and what speaks for them. Lists over layers have one entry for each of the L layers.

    Attributes:
        layers: the chosen layers, sorted, counted from 0.
        importance: 1 - CKA by `method`, in [0, 1] (debiased: may pass 1 by noise).
        intervals: (low, high) between which 95 % of the bootstrap draws lie, their mean moved to the importance.
        stability: share of the bootstrap draws, moved in the same way, in which the layer is chosen, in [0, 1].
        cka_biased, cka_debiased: both CKA values.
        constant: layers whose input or output is the same for every sample; their CKA is undefined and counted as 0.
        excluded: layers that may not be chosen (the encoder's first one).
        method: "biased" or "debiased".
        ratio, pooling, final_norm, n_samples, n_bootstrap, seed: as used.
        blocks_path: dotted name of the list of layers in the model.
        model: name of the model, if it has one.
    """

    layers: list[int]
    importance: list[float]
    intervals: list[tuple[float, float]]
    stability: list[float]
    cka_biased: list[float]
    cka_debiased: list[float]
    method: str
    ratio: float
    n_samples: int
    n_bootstrap: int
    seed: int
    constant: list[int] = field(default_factory=list)
    excluded: list[int] = field(default_factory=list)
    pooling: str | None = None
    final_norm: bool | None = None
    blocks_path: str | None = None
    model: str | None = None

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.importance)

    @property
    def ranking(self) -> list[int]:
        """All layers that may be chosen, the most important first."""
        allowed = [i for i in range(self.num_layers) if i not in self.excluded]
        return sorted(allowed, key=lambda i: -self.importance[i])

    def lora_config_kwargs(
        self, model: nn.Module, target_modules: str | Sequence[str] = "all-linear"
    ) -> dict[str, Any]:
        """Fields for `peft.LoraConfig`; see [`lora_config.lora_config_kwargs`]."""
        return lora_config_kwargs(model, self.layers, target_modules)

    def to_json(self, path: str | Path) -> Path:
        """Write all fields to a JSON file; gives its path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def from_json(cls, path: str | Path) -> "LayerSelection":
        """Read what [`to_json`] wrote."""
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
        fields["intervals"] = [tuple(pair) for pair in fields["intervals"]]
        return cls(**fields)

    def plot(self, path: str | Path) -> Path:
        """Draw importance with intervals, and stability, as a PNG (or what the suffix says); gives its path."""
        return plot_selection(self, path)


def number_of_layers(ratio: float, depth: int) -> int:
    """N = floor(ratio L), at least 1. Raises ValueError for a ratio outside (0, 1]."""
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio={ratio} is the share of layers to adapt, so it must be in (0, 1]; 0.5 is published")
    return max(1, math.floor(ratio * depth + 1e-9))  # 0.29 * 100 is a little below 29


def _top(importance_Lb: Tensor, count: int) -> Tensor:
    """Whether each layer is among the `count` highest, per column; ties go to the lower layer. (L, b) bool"""
    order = importance_Lb.sort(dim=0, descending=True, stable=True).indices
    return torch.zeros_like(importance_Lb, dtype=torch.bool).scatter_(0, order[:count], True)


def choose_layers(
    representations: Sequence[Tensor],
    *,
    ratio: float = 0.5,
    debiased: bool = False,
    exclude: Sequence[int] = (),
    n_bootstrap: int = 200,
    seed: int = 0,
) -> LayerSelection:
    """Score and choose from the representations R_0 .. R_L of the same n samples, each (n, d).

    Args:
        representations: for example from [`representations.collect_representations`].
        ratio: share of the layers to choose, in (0, 1].
        debiased: rank by the debiased CKA; both are reported either way.
        exclude: layers that may not be chosen.
        n_bootstrap: draws of n samples with replacement; 0 leaves intervals and stability at the point estimate.
        seed: of the draws.

    Raises:
        ValueError: a ratio outside (0, 1], fewer than 4 samples, values that are not finite, no layer left to choose.
    """
    depth, n = len(representations) - 1, len(representations[0])
    allowed = depth - len(set(exclude))
    count = number_of_layers(ratio, depth)
    if allowed < 1:
        raise ValueError(f"all of the {depth} layers are excluded ({sorted(exclude)}), so there is none to choose")
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(n, (n_bootstrap, n), generator=generator)
    # row 0 is the data as they are
    weights_bn = torch.cat(
        [torch.ones(1, n), torch.zeros(n_bootstrap, n).scatter_add_(1, draws, torch.ones(draws.shape))]
    )
    importance_Lb = 1 - consecutive_cka(representations, debiased=debiased, weights_bn=weights_bn)
    if n_bootstrap:
        # copies of a sample make the biased CKA larger, in some layers more than in others: only the spread is used
        importance_Lb[:, 1:] += importance_Lb[:, :1] - importance_Lb[:, 1:].mean(1, keepdim=True)
    other = consecutive_cka(representations, debiased=not debiased)
    ranked_Lb = importance_Lb.clone()
    ranked_Lb[list(exclude)] = -math.inf
    chosen_Lb = _top(ranked_Lb, min(count, allowed))
    drawn = slice(1, None) if n_bootstrap else slice(None)
    bounds = torch.tensor([0.025, 0.975], dtype=torch.float64)
    biased, debiased_cka = (other, 1 - importance_Lb[:, 0]) if debiased else (1 - importance_Lb[:, 0], other)
    constant = [is_constant(r) for r in representations]
    return LayerSelection(
        layers=chosen_Lb[:, 0].nonzero().squeeze(-1).tolist(),
        importance=importance_Lb[:, 0].tolist(),
        intervals=[tuple(pair) for pair in importance_Lb[:, drawn].quantile(bounds, dim=1).T.tolist()],
        stability=chosen_Lb[:, drawn].double().mean(1).tolist(),
        cka_biased=biased.tolist(),
        cka_debiased=debiased_cka.tolist(),
        method="debiased" if debiased else "biased",
        ratio=ratio,
        n_samples=n,
        n_bootstrap=n_bootstrap,
        seed=seed,
        constant=[i for i in range(depth) if constant[i] or constant[i + 1]],
        excluded=sorted(set(exclude)),
    )


def select_layers(
    model: nn.Module,
    dataset: Any,
    *,
    processing_class: Any = None,
    ratio: float = 0.5,
    debiased: bool = False,
    pooling: str | None = None,
    first_layer: str = "auto",
    final_norm: bool = True,
    n_samples: int = 128,
    batch_size: int = 8,
    max_length: int | None = 512,
    n_bootstrap: int = 200,
    seed: int = 0,
    device: torch.device | str | None = None,
    blocks_path: str | None = None,
    rendering: Rendering | None = None,
    progress: bool = True,
) -> LayerSelection:
    """Choose the layers of `model` worth adapting on `dataset`.

    Args:
        model: decoder, encoder or vision-language model of transformers, on any device or several, quantised; or a
            `PeftModel` around one (its adapters are off meanwhile). It is left as it was.
        dataset: rows of prompt and completion (plain or conversational), "messages", "text" or "input_ids", with
            "images" for a processor; a `Dataset`, a list, or a stream, of which the first rows are read.
        processing_class: tokenizer or processor; not needed for rows that are tokenised.
        ratio: share of the layers to choose, in (0, 1]; published: 0.5.
        debiased: rank by the debiased CKA instead of the published biased one.
        pooling: "last" (token of prompt + answer), "cls" (first token) or "mean"; None = "cls" for encoders, else
            "last".
        first_layer: "keep" or "exclude" it; "auto" excludes it with "cls" pooling, where its input is the same vector
            for every sample. With "last" pooling the same holds when all samples end in the same token: it is then
            kept with CKA 0, as published, and reported in `constant`.
        final_norm: R_L after the final norm, as published; False = the bare output of the last layer.
        n_samples: samples to read, drawn by `seed`; published: 128.
        batch_size: samples per forward.
        max_length: tokens per sample; published: 512. None = no limit.
        n_bootstrap: draws of the bootstrap.
        seed: of the drawn samples and of the bootstrap.
        device: run there and bring the model back; None = where it is.
        blocks_path: dotted name of the list of layers, for a model where it is not found.
        rendering: how training renders the rows (its end token, its answers' template); None = their text alone.
        progress: show a progress bar on stderr.

    Returns:
        The chosen layers and what speaks for them: importance, interval and stability of every layer.

    Raises:
        ValueError: an option outside its range, an unknown data format, too few samples, an encoder-decoder model, or
            one that is sharded over processes.
    """
    refuse_shards(model)
    pooling = pooling or ("cls" if is_encoder(model) else "last")
    if pooling not in POOLINGS:
        raise ValueError(
            f"pooling={pooling!r} is unknown; use one of {', '.join(POOLINGS)}, or None for the model's own"
        )
    if first_layer not in ("auto", "keep", "exclude"):
        raise ValueError(f"first_layer={first_layer!r} is unknown; use auto, keep or exclude")
    blocks = find_blocks(model, blocks_path)
    number_of_layers(ratio, len(blocks))  # a bad ratio is an error before the model runs
    config = base_model_of(model).config
    rows = draw_rows(dataset, n_samples, seed)
    samples = encode_rows(rows, processing_class, max_length, rendering)
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    pads = (getattr(tokenizer, "pad_token_id", None), getattr(config.get_text_config(), "pad_token_id", None), 0)
    batches = make_batches(samples, batch_size, next(pad for pad in pads if pad is not None))
    representations = collect_representations(
        model, batches, pooling=pooling, blocks=blocks, final_norm=final_norm, device=device, progress=progress
    )
    exclude = [0] if first_layer == "exclude" or (first_layer == "auto" and pooling == "cls") else []
    selection = choose_layers(
        representations, ratio=ratio, debiased=debiased, exclude=exclude, n_bootstrap=n_bootstrap, seed=seed
    )
    selection.pooling, selection.final_norm = pooling, final_norm
    selection.blocks_path, selection.model = blocks.path, name_of(config)
    return selection
