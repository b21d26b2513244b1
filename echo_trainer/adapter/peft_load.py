"""What PEFT's own loader makes of an adapter on its base, found out on "meta": names and shapes, no weights.

PEFT decides what an adapter is: which modules a config is about, how their tensors are called, which old names are
translated. Nothing of that is written down here a second time. The config is given to PEFT on a model without weights,
then tensors without values, in the names and shapes of the file; what it does not take, and what it misses, is said.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

from .folder import PREFIX, Adapter
from .vocabulary import fit_vocabulary

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Variants that compute with the base's weights when they are put in place, or need an engine of their own.
_NOT_WITHOUT_WEIGHTS = ("arrow_config", "megatron_config", "monteclora_config")


@dataclass(frozen=True)
class PeftLoad:
    """
    The outcome of `load_without_weights`; all names are those of the file.

    Attributes:
        error: why PEFT refuses the config on this base, in a line; None where it does not.
        unexpected: tensors of the file that PEFT has no place for.
        mismatched: tensors of the file that have another shape than their place: PEFT refuses the file.
        missing: tensors that the config announces and the file lacks; PEFT leaves them as initialised.
    """

    error: str | None = None
    unexpected: frozenset[str] = field(default_factory=frozenset)
    mismatched: frozenset[str] = field(default_factory=frozenset)
    missing: frozenset[str] = field(default_factory=frozenset)

    def takes(self, key: str) -> bool:
        """Whether PEFT loads this tensor of the file."""
        return self.error is None and key not in self.unexpected and key not in self.mismatched


def load_without_weights(adapter: Adapter, build: Callable[[], Any]) -> PeftLoad | None:
    """
    Load an adapter with PEFT, without any weight.

    Args:
        adapter: a LoRA adapter.
        build: makes its base on "meta".

    Returns:
        What PEFT took; None where it cannot be asked without weights.
    """
    settings = adapter.config
    if settings.get("peft_type") != "LORA" or any(settings.get(name) for name in _NOT_WITHOUT_WEIGHTS):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _load(adapter, build())
    except NotImplementedError:  # a computation with values
        return None
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        if "meta" in str(error):
            return None
        return PeftLoad(error=_in_a_line(error))


def _load(adapter: Adapter, model: Any) -> PeftLoad:
    config = PeftConfig.from_pretrained(str(adapter.folder))
    config.inference_mode = True
    vars(config)["init_lora_weights"] = False  # the initialisations compute with weights
    fit_vocabulary(model, adapter)
    model = get_peft_model(model, config, low_cpu_mem_usage=True)
    tensors = {
        key: torch.empty(tensor.shape, dtype=_DTYPES.get(tensor.dtype, torch.float32), device="meta")
        for key, tensor in adapter.tensors.items()
    }
    result = set_peft_model_state_dict(model, tensors, ignore_mismatched_sizes=True, low_cpu_mem_usage=True)
    missing = {key: _in_the_file(key) for key in result.missing_keys if "lora_" in key}
    # What has another shape than its place is left out and counted among the missing.
    mismatched = adapter.tensors.keys() & {*missing, *missing.values()}
    return PeftLoad(
        unexpected=frozenset(adapter.tensors.keys() & set(result.unexpected_keys) - adapter.copies),
        mismatched=frozenset(mismatched),
        missing=frozenset(name for key, name in missing.items() if not {key, name} & mismatched),
    )


def _in_the_file(key: str) -> str:
    """The name of a tensor in an adapter's file, from the name it has in the model."""
    name = key.replace(".default", "")
    return name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name


def _in_a_line(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"the file has no tensor {str(error).strip(chr(39)).removeprefix(PREFIX)}, which the config announces"
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
