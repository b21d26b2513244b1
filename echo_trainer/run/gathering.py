"""Whole tensors from parameters that an engine has sharded, and back. Every process must call these functions."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn


@contextmanager
def gathered(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """The values of parameters, whole, whatever engine holds them; inside the block only, and not to be changed."""
    in_shards = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]  # ZeRO-3
    if in_shards:
        import deepspeed  # pyright: ignore[reportMissingImports]  an optional engine

        with deepspeed.zero.GatheredParameters(in_shards):
            yield [_whole(parameter.detach()) for parameter in parameters]
    else:
        yield [_whole(parameter.detach()) for parameter in parameters]


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters of a module by name, whole and copied to the CPU, whatever engine holds them."""
    named = dict(module.named_parameters())
    with gathered(list(named.values())) as values:
        return {name: value.cpu().clone().contiguous() for name, value in zip(named, values, strict=True)}


def load_whole_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """
    Load what `whole_state` returned into a module that FSDP2 may have sharded.

    Raises:
        RuntimeError: names or shapes differ.
    """
    from torch.distributed.tensor import distribute_tensor

    own: dict[str, Any] = dict(module.named_parameters())
    state = {
        name: distribute_tensor(value.to(own[name].device), own[name].device_mesh, own[name].placements)
        if name in own and hasattr(own[name], "device_mesh")
        else value
        for name, value in state.items()
    }
    module.load_state_dict(state)


def whole_trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """
    Trainable parameters of a model that FSDP2 has sharded, whole on the CPU of the main process, empty on the others.

    The frozen base, which may not fit into the memory of one machine, stays where it is.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return cast("dict[str, Tensor]", get_model_state_dict(model, options=options))


def keeps_shards(trainer: Any) -> bool:
    """Whether the trainer's engine writes checkpoints in shards and leaves the adapter out of them."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    return plugin is not None and "SHARDED_STATE_DICT" in str(plugin.state_dict_type)


def _whole(value: Any) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value
