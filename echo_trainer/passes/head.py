"""The language-model head as a function of hidden states, for only the positions that are asked for.

Never (B, T, vocab): a step projects the positions that predict answer tokens, a chunk at a time.

What a model does to its hidden states before the head, and to its logits after it (scales, soft-capping, under a
different name in every family), is not written down here a second time: the model's own forward runs, with its
backbone replaced by the hidden states at hand.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from .modules import forward_replaced

T = TypeVar("T")


@dataclass(frozen=True)
class LanguageModelHead:
    """
    The last step of a causal language model: logits = f(W g(h) + b), with g and f as the model has them.

    Attributes:
        model: the causal language model.
        project: its output embeddings as they compute, W x + b.
        parameters: those of the projection that are trained; empty for most adapters.
        outputs: what its backbone returned in the plain pass; a pattern for what stands in for it.
        backbones, heads: where the model looks for its backbone and for its output embeddings.
        vocabulary: V, number of logits.
    """

    model: PreTrainedModel
    project: Callable[[Tensor], Tensor]
    parameters: tuple[Tensor, ...]
    outputs: Any
    backbones: list["_Place"]
    heads: list["_Place"]
    vocabulary: int

    def logits(self, hidden_Nd: Float[Tensor, "N d"]) -> Float[Tensor, "N V"]:
        """Logits (N, V), at least float32, for hidden states (N, d)."""
        outputs = self.run(hidden_Nd)
        logits_NV = outputs.logits.reshape(len(hidden_Nd), -1)
        return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))

    def run(self, hidden_Nd: Float[Tensor, "N d"], **inputs: Any) -> Any:
        """What the model returns where its backbone has returned these hidden states (N, d)."""
        backbone = replace(self.outputs, last_hidden_state=hidden_Nd[None])
        ids = torch.zeros(1, len(hidden_Nd), dtype=torch.int64, device=hidden_Nd.device)
        with _stand_in(self.backbones, lambda *args, **kwargs: backbone), _stand_in(self.heads, self.project):
            # The class's forward: others may have put a forward of their own on the instance.
            return type(self.model).forward(self.model, input_ids=ids, use_cache=False, **inputs)


def with_head(model: PreTrainedModel, backbone: nn.Module, outputs: Any, use: Callable[[LanguageModelHead], T]) -> T:
    """
    What `use` returns for the head of a causal language model of transformers.

    It is called inside a call of the head module, where an engine that shards parameters has gathered the head's.

    Args:
        model: the causal language model.
        backbone: the part of it below the head.
        outputs: what the backbone returned in the plain pass.
        use: called once.
    """
    module = model.get_output_embeddings()  # looked up anew, since PEFT and FSDP replace modules
    assert module is not None  # a causal language model has a head
    own = module.forward
    result: list[T] = []

    def forward() -> None:
        # Not returned: an engine with mixed precision would cast it.
        head = LanguageModelHead(
            model=model,
            project=own,
            parameters=tuple(p for p in module.parameters() if p.requires_grad),
            outputs=replace(outputs, last_hidden_state=None),
            backbones=_places(model, _backbones(model, backbone)),
            heads=_places(model, [module]),
            vocabulary=_vocabulary(module),
        )
        result.append(use(head))

    with forward_replaced(module, forward):
        module()
    return result[0]


def _vocabulary(module: Any) -> int:
    """Number of logits; a quantised weight has another shape."""
    return getattr(module, "out_features", None) or module.weight.shape[0]


class _StandIn(nn.Module):
    """Runs `forward` in place of a module, without the hooks on that; every other attribute is the module's."""

    def __init__(self, module: nn.Module, forward: Callable):
        super().__init__()
        self.__dict__["stands_for"], self.__dict__["forward"] = module, forward

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["stands_for"], name)


@dataclass(frozen=True)
class _Place:
    """Where a module looks for one of its children."""

    parent: nn.Module
    name: str
    child: nn.Module


@contextmanager
def _stand_in(places: list[_Place], forward: Callable) -> Iterator[None]:
    """
    Put stand-ins where a model looks for its modules.

    Not the modules themselves with another forward: an engine's hooks on a module (gathering, tracing) would run once
    for every chunk of positions, and not equally often on every process.
    """
    for place in places:
        setattr(place.parent, place.name, _StandIn(place.child, forward))
    try:
        yield
    finally:
        for place in places:
            setattr(place.parent, place.name, place.child)


def _backbones(model: PreTrainedModel, backbone: nn.Module) -> list[nn.Module]:
    """What the forward of a model may call to get its hidden states; OPT calls the decoder inside its backbone."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return [backbone] if decoder in (None, model) else [backbone, decoder]


def _places(model: nn.Module, wanted: list[nn.Module]) -> list[_Place]:
    """Where some modules hang; nothing is looked for below a decoder layer."""
    found, unseen, ids = [], [model], {id(module) for module in wanted}
    while unseen:
        parent = unseen.pop()
        for name, child in parent.named_children():
            if id(child) in ids:
                found.append(_Place(parent, name, child))
            if not isinstance(child, nn.ModuleList):
                unseen.append(child)
    return found
