"""Models without weights, built from a config.

Private: `_from_config` of a transformers model class (seen in 5.23, 5.24), since `from_config` of the auto classes
knows no class by its name; `set_zero3_state` (5.23, 5.24), which keeps DeepSpeed's ZeRO-3 out of it. Without the first
the auto class is asked; without the second the model is built as it comes, which fails in a ZeRO-3 run only.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers


def empty_model(config: Any) -> Any:
    """
    A model of a config's architecture on the meta device.

    Raises:
        ValueError: this transformers knows no causal language model for the config.
    """
    architecture = (getattr(config, "architectures", None) or [""])[0]
    build = getattr(getattr(transformers, architecture, None), "_from_config", None)
    # In a run with ZeRO-3 transformers would build it on every process, and only the main process is here.
    with torch.device("meta"), _without_zero3():
        return build(config) if build else transformers.AutoModelForCausalLM.from_config(config)


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
