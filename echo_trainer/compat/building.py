"""Models by their config: without weights, with random ones, or loaded, in the class that was trained.

Private: `_from_config` of a transformers model class (seen in 5.23, 5.24), since `from_config` of the auto classes
knows no class by its name; `set_zero3_state` (5.23, 5.24), which keeps DeepSpeed's ZeRO-3 out of it. Without the first
the auto class is asked; without the second the model is built as it comes, which fails in a ZeRO-3 run only. Where
`_hf_hook` of accelerate (1.15) has another name, a copy of a model on several devices runs with no hooks, or fails.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from accelerate.hooks import add_hook_to_module, remove_hook_from_module


def empty_model(config: Any, model_class: Any = None) -> Any:
    """
    A model of a config's architecture on the meta device.

    Args:
        config: of the model; it is not changed, and the model has a copy of its own.
        model_class: None takes the one that the config names.

    Raises:
        ValueError: this transformers knows no causal language model for the config.
    """
    config = copy.deepcopy(config)
    build = getattr(model_class or _named_class(config), "_from_config", None)
    # In a run with ZeRO-3 transformers would build it on every process, and only the main process is here.
    with torch.device("meta"), _without_zero3():
        return build(config) if build else transformers.AutoModelForCausalLM.from_config(config)


def load_model(name: str, **options: Any) -> Any:
    """
    A model with its weights, in the class that its config names, as TRL loads it.

    `AutoModelForCausalLM` knows no vision-language model, or only the language model of one, whose modules have other
    names than an adapter's.

    Args:
        name: folder or Hub id.
        options: of `from_pretrained`.

    Raises:
        OSError, ValueError: as `from_pretrained` does.
    """
    remote = options.get("trust_remote_code", False)
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=remote)
    custom = remote and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    model_class = None if custom else _named_class(config)
    return (model_class or transformers.AutoModelForCausalLM).from_pretrained(name, **options)


def _named_class(config: Any) -> Any:
    """The class of transformers that a config names; None where it names none, or one of another place."""
    names = getattr(config, "architectures", None) or [""]
    return getattr(transformers, names[0], None)


def forget_replaced_forwards(model: Any) -> None:
    """
    Let every module of a model run the forward of its class again.

    What a trainer has put on a module runs the model that it was made for, also in a copy. Hooks of accelerate, which
    move inputs between devices, are taken off and put on again.
    """
    for module in model.modules():
        hook = vars(module).get("_hf_hook")  # a PeftModel hands on what its base has
        if hook is not None:
            remove_hook_from_module(module)
        vars(module).pop("forward", None)
        if hook is not None:
            add_hook_to_module(module, hook)


def random_model(model_class: type, config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A model of a class with random weights, made on `device` in `dtype`."""
    with device:
        return model_class._from_config(config, dtype=dtype)


@contextmanager
def _without_zero3() -> Iterator[None]:
    try:
        from transformers.modeling_utils import set_zero3_state
    except ImportError:
        yield
        return
    with set_zero3_state():
        yield
