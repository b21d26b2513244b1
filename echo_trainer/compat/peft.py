"""Which modules a configuration is about, as PEFT decides it.

Not public, seen in peft 0.21: `tuners.lora.layer.ParamWrapper` (LoRA on a bare parameter, such as fused experts),
`tuners.tuners_utils.check_target_module_exists` and `utils.other.get_pattern_key`. The last two decide what an adapter
does to a model, so where they are gone the import fails by name. Without `ParamWrapper` no module is one.
"""

from collections.abc import Iterable
from typing import Any

from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn


def wraps_a_parameter(module: nn.Module) -> bool:
    """Whether a LoRA layer adapts a bare parameter: its inputs are not tokens in the order of the sequence."""
    try:
        from peft.tuners.lora.layer import ParamWrapper
    except ImportError:
        return False
    return isinstance(module, ParamWrapper)


def targets(config: Any, path: str) -> bool:
    """
    Whether PEFT, with this LoRA configuration, adapts the module at `path`.

    Of "all-linear" only the model can say which modules it is: each may be one.
    """
    if isinstance(config.target_modules, str) and config.target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return True
    from peft.tuners.tuners_utils import check_target_module_exists

    return bool(check_target_module_exists(config, path))


def pattern_key(patterns: Iterable[str], path: str) -> str:
    """The key of a rank or alpha pattern that is about the module at `path`; `path` itself where none is."""
    from peft.utils.other import get_pattern_key

    return get_pattern_key(list(patterns), path)


def is_method(peft_type: str | None) -> bool:
    """Whether PEFT knows a method of this name; in small letters it knows none."""
    from peft import PeftType

    return peft_type in {str(each.value) for each in PeftType}


def mergeable(peft_type: str | None) -> bool:
    """Whether adapters of a method can become a part of the weights: no prompts, no choice among adapters by input."""
    from peft import PEFT_TYPE_TO_TUNER_MAPPING

    tuners = {str(key.value): tuner for key, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()}
    tuner = tuners.get(peft_type or "")
    return hasattr(tuner, "merge_and_unload") and peft_type not in ("POLY", "SHADOW", "XLORA")
