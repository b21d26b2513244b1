"""Tensors that have a shape, a dtype and a device and no values: who asks for a value gets an error from torch."""

from dataclasses import fields, is_dataclass, replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode


def without_data(mode: FakeTensorMode, value):
    """A tensor, a record, a tuple or a dict of such without their values; everything else as it is."""
    if isinstance(value, torch.Tensor):
        return mode.from_tensor(value)
    if is_dataclass(value):
        return replace(value, **{item.name: without_data(mode, getattr(value, item.name)) for item in fields(value)})
    if isinstance(value, tuple):
        return tuple(without_data(mode, each) for each in value)
    return {k: without_data(mode, v) for k, v in value.items()} if isinstance(value, dict) else value


def forget_values(mode: FakeTensorMode, module: nn.Module) -> None:
    """Take the values of a module's parameters and buffers away; call it inside the mode."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            fake = mode.from_tensor(parameter).detach()
            setattr(part, name, nn.Parameter(fake, requires_grad=parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = mode.from_tensor(buffer)
