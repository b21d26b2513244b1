"""What a run starts from: something is trained, and the KL divergence is that from the start.

| given | reference, as TRL makes it |
|---|---|
| a model and `peft_config` | the model without the adapter: right where a new adapter changes nothing |
| an adapter (`PeftModel`) | a frozen copy of the adapter "default", called "ref" |
| a model, all of whose weights are trained | loaded again from where the model came from |
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel

from ..compat.identity import name_of

STARTS = ("init_lora_weights", "init_weights", "init_ia3_weights")
"""Fields of PEFT's configurations that say how an adapter starts."""

NEUTRAL = (True, "gaussian", "eva", "orthogonal", "mica", "lycoris")
"""Their values with which a new adapter changes nothing, nor the base."""


def refuse_start(model: Any, peft_config: Any, beta: float) -> None:
    """
    Refuse what is not trained, or what the KL divergence would not be from.

    Args:
        model, peft_config: of the trainer.
        beta: 0 has no reference.

    Raises:
        ValueError: what it is, and what to write instead.
    """
    if peft_config is not None:
        if beta:
            _refuse_new_adapter(peft_config, beta)
    elif not isinstance(model, str):
        _refuse_frozen(model)
        if beta:
            _refuse_without_copy(model, beta)


@contextmanager
def copied_as_it_is(model: Any) -> Iterator[None]:
    """
    While TRL copies an adapter it initialises the copy first; PiSSA, OLoRA and others would change the base again.

    Args:
        model: of the trainer; anything but a `PeftModel` is left alone.
    """
    configs: list[Any] = list(model.peft_config.values()) if isinstance(model, PeftModel) else []
    kept = [(config, config.init_lora_weights) for config in configs if hasattr(config, "init_lora_weights")]
    try:
        for config, _ in kept:
            config.init_lora_weights = True
        yield
    finally:
        for config, start in kept:
            config.init_lora_weights = start


def refuse_other_reference(model: Any, reference: Any, beta: float) -> None:
    """
    Refuse, with a ValueError, a model that is not the one it came from, which is the reference.

    Args:
        model: as it was given.
        reference: as TRL has loaded it.
        beta: for the message.
    """
    others = dict(reference.named_parameters())
    changed = [name for name, value in model.named_parameters() if not _same(value, others.get(name))]
    if changed:
        raise ValueError(
            f"beta={beta} compares with the model at the start, which is loaded again from "
            f"{name_of(model.config)}, and {len(changed)} of the given model's tensors, {changed[0]} among them, are "
            f"not those that are saved there. Save the model and pass the new folder, train a LoRA (peft_config), or "
            f"write beta=0."
        )


def _same(value: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and other.shape == value.shape and torch.equal(value, other.to(value))


def _refuse_frozen(model: Any) -> None:
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    if isinstance(model, PeftModel):
        raise ValueError(
            "The PeftModel has no trainable parameter (all have requires_grad=False), so nothing would be trained. "
            "Load it with PeftModel.from_pretrained(model, adapter, is_trainable=True)."
        )
    raise ValueError(
        "All weights of the model are frozen (requires_grad=False), so nothing would be trained. Pass a `peft_config` "
        "to train a LoRA on it, or call model.requires_grad_(True) to train all weights."
    )


def _refuse_new_adapter(config: Any, beta: float) -> None:
    if getattr(config, "is_prompt_learning", False):
        given, instead = f"a {type(config).__name__}", "Pass a LoraConfig"
    else:
        starts = {name: getattr(config, name) for name in STARTS if hasattr(config, name)}
        name, start = next(((n, s) for n, s in starts.items() if s not in NEUTRAL), (None, None))
        if name is None:
            return
        given, instead = f"{name}={start!r}", f"Write {name}=True"
    raise ValueError(
        f"beta={beta} compares with the model at the start, which is computed by switching the new adapter off, and "
        f"with {given} the adapter changes the model (or its base) from the start, so it would be compared with "
        f"another model. {instead}, or beta=0, or pass the adapted model (`get_peft_model`), of whose adapter a copy "
        f"is kept."
    )


def _refuse_without_copy(model: Any, beta: float) -> None:
    if isinstance(model, PeftModel):
        if model.active_adapters != ["default"]:
            raise ValueError(
                f"The active adapters of the PeftModel are {model.active_adapters}, and beta={beta} compares with a "
                f"copy of the one called 'default'. Load it without `adapter_name`, or write beta=0."
            )
    elif name_of(model.config) is None:
        raise ValueError(
            f"beta={beta} compares with the model at the start, which is loaded again from where it came from, "
            f"and this model was made in memory. Save it and pass the folder, train a LoRA (peft_config), or write "
            f"beta=0."
        )
