"""What PEFT's own loader makes of an adapter, without any code of ours."""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import adapter_cases as make
import torch
from peft import PeftModel
from safetensors import SafetensorError

REFUSALS = (ValueError, RuntimeError, TypeError, KeyError, AttributeError, OSError, re.error, SafetensorError)


@dataclass
class Outcome:
    """`how` is "refuses", "in part" or "whole"; logits where something was loaded; `why` in words."""

    how: str
    logits: torch.Tensor | None = None
    why: str = ""

    def is_what_was_trained(self, trained: torch.Tensor) -> bool:
        """Whether PEFT loads all of the adapter and then computes what was trained."""
        return self.how == "whole" and bool(torch.allclose(self.logits, trained, rtol=1e-4, atol=1e-4))


def load_with_peft(base: Path, folder: Path) -> Outcome:
    """Load an adapter as a user does, and once more for what PEFT says of its keys."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(41)
            model = PeftModel.from_pretrained(make.load_base(base), folder)
            result = model.load_adapter(folder, "default")
            with torch.no_grad():
                logits = model.eval()(input_ids=make.IDS % 63).logits
    except REFUSALS as error:
        return Outcome("refuses", why=f"{type(error).__name__}: {error}")
    # A module without any tensor was not trained: its B stays zero.
    left_out = [key for key in result.missing_keys if not _untrained(folder, key, result.missing_keys)]
    prompts = model.active_peft_config.is_prompt_learning  # they have their own way into the model
    odd = [*left_out, *([] if prompts else result.unexpected_keys)]
    return Outcome("in part" if odd else "whole", logits, ", ".join(odd[:3]))


def _untrained(folder: Path, key: str, missing: list[str]) -> bool:
    module = key.partition(".lora_")[0]
    names = make.load_file(folder / make.WEIGHTS)
    return bool(names) and not any(name.startswith(f"{module}.") for name in names)
