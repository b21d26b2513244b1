"""The representation of every sample at every layer of a frozen model: one row per sample and layer, nothing more.

Shape legend
    B : samples of a batch      T : tokens      d : hidden size      n : all samples
    `hidden_BTd` is (B, T, d), `mask_BT` is (B, T), `rows_nd` is (n, d)

R_0 is the input of the first block (the embedding output), R_i the input of block i + 1, and R_L the output of the
module that owns the blocks, so it has passed the final norm where there is one: the same as `output_hidden_states`
gives, without ever holding the states of all tokens of more than one layer. Each hook pools on the device where its
layer lives and moves (B, d) numbers to the CPU, so quantised and sharded models need no special care.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..passes.layers import layer_list
from ..passes.modules import base_model_of

POOLINGS = ("last", "cls", "mean")


@dataclass(frozen=True)
class Blocks:
    """The transformer blocks of a model.

    Attributes:
        path: dotted name of their `nn.ModuleList` in the base model, such as "model.layers" or "encoder.layer".
        modules: the list itself.
        owner: the module that runs them and whose first output is R_L.
    """

    path: str
    modules: nn.ModuleList
    owner: nn.Module

    def __len__(self) -> int:
        return len(self.modules)


def find_blocks(model: nn.Module, path: str | None = None) -> Blocks:
    """Find the blocks of a decoder, an encoder, or the language model of a vision-language model.

    Args:
        model: a transformers model, or a `PeftModel` around one.
        path: dotted name of the list of blocks in the base model, for a model where the search fails.

    Raises:
        ValueError: an encoder-decoder model, or no list of `num_hidden_layers` blocks.
    """
    base = base_model_of(model)
    modules = layer_list(base, path, option="blocks_path")
    name = next(name for name, module in base.named_modules() if module is modules)
    return Blocks(name, modules, base.get_submodule(name.rpartition(".")[0]))


def is_encoder(model: nn.Module) -> bool:
    """Whether the model reads in both directions (BERT, RoBERTa, DeBERTa ...), told from its config."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    config = base_model_of(model).config.get_text_config()
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)


def pool(hidden_BTd: Tensor, mask_BT: Tensor, pooling: str) -> Tensor:
    """One row per sample: the last or first token that is not padding (whichever the side), or their mean. (B, d)"""
    mask = mask_BT.to(hidden_BTd.device).bool()
    if pooling == "mean":
        weights = mask.float().unsqueeze(-1)
        return (hidden_BTd.float() * weights).sum(1) / weights.sum(1)
    positions = torch.arange(mask.shape[1], device=mask.device)
    if pooling == "last":
        index = torch.where(mask, positions, -1).amax(1)
    else:
        index = torch.where(mask, positions, mask.shape[1]).amin(1)
    return hidden_BTd[torch.arange(len(index), device=index.device), index]


class _Recorder:
    """Keeps the pooled rows of each layer; `mask_BT` is set before each forward."""

    def __init__(self, blocks: Blocks, pooling: str, final_norm: bool):
        self.blocks, self.pooling, self.final_norm = blocks, pooling, final_norm
        self.rows: list[list[Tensor]] = [[] for _ in range(len(blocks) + 1)]
        self.mask_BT: Tensor | None = None

    def _keep(self, layer: int, hidden_BTd: Tensor) -> None:
        assert self.mask_BT is not None  # set before each forward
        if hidden_BTd.shape[:2] != self.mask_BT.shape:
            raise ValueError(
                f"layer {layer} works on {tuple(hidden_BTd.shape[:2])} (samples, tokens), but the attention mask is "
                f"{tuple(self.mask_BT.shape)}, so the pooled token is unknown; if the model expands image tokens "
                "itself, use a processor that writes one placeholder for each image token"
            )
        self.rows[layer].append(pool(hidden_BTd, self.mask_BT, self.pooling).float().cpu())

    def _input_hook(self, layer: int):
        def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._keep(layer, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

        return hook

    def _output_hook(self, _module: nn.Module, _args: tuple, output: Any) -> None:
        self._keep(len(self.blocks), output if isinstance(output, Tensor) else output[0])

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks on for the block, off after it whatever happens."""
        last = self.blocks.owner if self.final_norm else self.blocks.modules[-1]
        handles = [
            block.register_forward_pre_hook(self._input_hook(layer), with_kwargs=True)
            for layer, block in enumerate(self.blocks.modules)
        ]
        handles.append(last.register_forward_hook(self._output_hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def _frozen(model: nn.Module, device: torch.device | str | None) -> Iterator[torch.device]:
    """Evaluation mode, no gradients, adapters off, on `device`; everything is put back. Gives the input device."""
    base = base_model_of(model)
    spread = set((getattr(base, "hf_device_map", None) or {}).values())
    home = next(base.parameters()).device
    if device is not None and (len(spread) > 1 or getattr(base, "is_quantized", False)):
        state = f"spread over {', '.join(sorted(map(str, spread)))}" if len(spread) > 1 else "quantised"
        raise ValueError(
            f"device={str(device)!r} was given, but the model is {state}, so it must not be moved; leave device out, "
            "the rows are collected from wherever each layer is"
        )
    # modes are put back one by one: a user may have frozen single parts in evaluation mode
    modes = [(module, module.training) for module in model.modules()]
    if device is not None:
        model.to(device)
    has_adapter = hasattr(model, "disable_adapter")
    model.eval()
    try:
        with torch.no_grad(), cast(PeftModel, model).disable_adapter() if has_adapter else nullcontext():
            embedding = cast(torch.Tensor, base.get_input_embeddings().weight).device
            # weights offloaded by accelerate are on "meta" between uses
            yield base.device if embedding.type == "meta" else embedding
    finally:
        for module, mode in modes:
            module.training = mode
        if device is not None:
            model.to(home)


def refuse_shards(model: nn.Module) -> None:
    """Refuse a model of which each process holds a part, with a ValueError: layers are selected in one process."""
    for parameter in model.parameters():
        if hasattr(parameter, "ds_id") or hasattr(parameter, "device_mesh"):
            engine = "DeepSpeed's ZeRO-3" if hasattr(parameter, "ds_id") else "FSDP2 or tensor parallelism"
            raise ValueError(
                f"The model was sharded by {engine} while it was loaded, so no process can run it alone, and layers "
                f"are selected in one process. Select them before, `echo-trainer select-layers --config RECIPE` in "
                f"one process, and write the layers where 'cka' is now."
            )


def collect_representations(
    model: nn.Module,
    batches: Sequence[dict[str, Tensor]],
    *,
    pooling: str,
    blocks: Blocks,
    final_norm: bool = True,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> list[Tensor]:
    """Run the frozen model over the batches and keep one row per sample and layer.

    Args:
        model: transformers model or `PeftModel` (its adapters are switched off meanwhile).
        batches: keyword arguments of the model, each with `attention_mask` (B, T).
        pooling: "last", "cls" (first token) or "mean", over tokens that are not padding, on either side.
        blocks: from [`find_blocks`].
        final_norm: R_L after the final norm, as published; False = the bare output of the last block.
        device: move the model there meanwhile; None = where it is.
        progress: show a progress bar on stderr.

    Returns:
        R_0 .. R_L, each (n, d) float32 on the CPU, in the order of the batches.
    """
    from rich.console import Console
    from rich.progress import track

    recorder = _Recorder(blocks, pooling, final_norm)
    base = base_model_of(model)
    accepted = signature(base.forward).parameters
    # neither keys and values nor logits are of use; a model of several modalities hands use_cache on by **kwargs
    extra = {"use_cache": False, "logits_to_keep": 1}
    several = base.config.get_text_config() is not base.config
    extra = {k: v for k, v in extra.items() if k in accepted or (k == "use_cache" and several)}
    console = Console(stderr=True)
    with _frozen(model, device) as where, recorder.attached():
        for batch in track(batches, "Reading representations", console=console, disable=not progress):
            recorder.mask_BT = batch["attention_mask"]
            base(**{name: value.to(where) for name, value in batch.items()}, **extra)
    return [torch.cat(rows) for rows in recorder.rows]
