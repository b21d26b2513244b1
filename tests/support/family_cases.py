"""What a family must get right: the pass that the proof chooses gives the loss and the gradients of the full pass."""

from dataclasses import dataclass, replace

import torch
from families import family_model, vision_language_model
from models import adapted
from peft import PeftModel
from steps import (
    assert_same_gradients,
    echo_setup,
    packed_example,
    padded_collator,
    padding_free_collator,
    planned_batch,
    random_examples,
    step_gradients,
)

from echo_trainer.method.forms import EchoForm
from echo_trainer.method.routing import RoutingSchedule
from echo_trainer.passes.echo import RECOMPUTED, ROWS
from echo_trainer.passes.proof import prove
from echo_trainer.run.agreement import Agreement
from echo_trainer.run.collate import EchoCollator
from echo_trainer.run.pass_choice import PassChoice
from echo_trainer.run.proof_rows import no_trace, proof_inputs

# Modules that PEFT refuses or cannot run a LoRA on, in plain SFT as well.
NO_LORA = {"out_proj", "conv1d", "router", "gate"}
REFUSED, FAILS = "refused", "transformers refuses"
LAYOUTS = ("padded", "packed", "padding-free")


class NotTriedError(Exception):
    """A family that cannot be made tiny, or whose tiny model does not run by itself."""


@dataclass(frozen=True)
class Outcome:
    """What became of a family and a layout: a form of the echo pass, or a reason."""

    form: str
    why: str = ""


def adapted_family(family: str, dtype: torch.dtype) -> PeftModel:
    """A tiny model of a family with a random LoRA on all linear layers, in evaluation mode."""
    vision = family in vision_language_model.families
    for attention in ("sdpa", "eager"):
        try:
            build = vision_language_model if vision else family_model
            model = build(family, attention=attention, dtype=dtype)
            break
        except ValueError as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
    }
    head = next((name for name, m in model.named_modules() if m is model.get_output_embeddings()), "")
    targets = sorted(n for n in names - NO_LORA - {head.rpartition(".")[2]} if not n.isdigit())
    return adapted(model, target_modules=targets).to(dtype).eval()


def running_model(family: str) -> tuple[PeftModel, torch.dtype]:
    """A tiny model that runs by itself, in float64 where its kernels know it."""
    for dtype in (torch.float64, torch.float32):
        try:
            model = adapted_family(family, dtype)
            with torch.no_grad():
                model(input_ids=torch.tensor([[2, 3, 4, 5]]))
        except Exception as error:
            why = f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
        else:
            return model, dtype
    raise NotTriedError(f"no tiny {family} that runs by itself ({why})")


def batch_of(layout: str):
    """Examples and the collator of a layout."""
    examples = random_examples(4, seed=2, low=8, high=14)
    if layout == "padded":
        return examples, padded_collator()
    if layout == "padding-free":
        return examples, padding_free_collator()
    return [packed_example(examples[:2]), packed_example(examples[2:])], padding_free_collator()


def chosen_form(model: PeftModel, setup, layout: str, recompute: bool = False) -> tuple[EchoForm, list[str]]:
    """The form that the proof chooses, and why not a cheaper one."""
    examples, collator = batch_of(layout)
    echo = EchoCollator(collator)
    echo.schedule = RoutingSchedule(1, 1.0, 1.0, total_steps=10, batch_size=len(examples))
    draft = echo.draft(examples, 0, 0)
    choice = PassChoice("auto", Agreement(), type(model.get_base_model()).__name__, recompute=recompute)

    def compare(draft, form):
        with no_trace(model):
            inputs, task = proof_inputs(draft, form, collator, "cpu")
            return prove(setup, inputs, task)

    choice.settle([draft], compare, 0)
    (verdict,) = choice.verdicts.values()
    return verdict.form, verdict.against


def try_family(family: str, layout: str) -> Outcome:
    """
    Choose the pass of a family and compare its step with that of the full pass, with and without checkpointing.

    Raises:
        AssertionError: the chosen pass gives another loss or other gradients than the full one.
    """
    model, dtype = running_model(family)
    try:
        setup = echo_setup(model)
        form, against = chosen_form(model, setup, layout)
    except ValueError as error:
        if "no causal model" in str(error):
            return Outcome(REFUSED, "sees later tokens")
        if "causal_conv1d" in str(error):
            return Outcome(FAILS, "packed rows need the package causal_conv1d")
        if "echo_layers" in str(error):
            return Outcome("name the layers in echo_layers", "the layers are not a list of num_hidden_layers")
        raise
    _compare_with_the_full_pass(model, setup, layout, dtype, lambda: form)
    return Outcome(str(form), "; ".join(against))


def try_computing_again(family: str, layout: str) -> list[Outcome]:
    """
    As `try_family`, where the pass over suffixes may compute again what it would keep; first without checkpointing.

    Raises:
        AssertionError: the chosen pass gives another loss or other gradients than the full one.
    """
    model, dtype = running_model(family)
    setup, outcomes = echo_setup(model), []

    def choose():
        setup.unneeded = None
        form, against = chosen_form(model, setup, layout, recompute=True)
        outcomes.append(Outcome(str(form), "; ".join(against)))
        return form

    _compare_with_the_full_pass(model, setup, layout, dtype, choose)
    return outcomes


def _compare_with_the_full_pass(model: PeftModel, setup, layout: str, dtype: torch.dtype, choose) -> None:
    """A step with the form that `choose` says, without and with checkpointing, against one with the full pass."""
    examples, collator = batch_of(layout)

    def step(form):
        batch, plan = planned_batch(examples, suffix=form.runs_suffixes, collator=collator, seed=1)
        if form is RECOMPUTED:
            plan = replace(plan, form=RECOMPUTED, layout=replace(plan.layout, recompute=True))
        return step_gradients(model, setup, batch, plan)

    model.train()
    full, full_gradients = step(ROWS)
    if full["objective"] != step(ROWS)[0]["objective"]:
        model.eval()  # routers that draw random numbers in training (PhiMoE), in every pass anew
        full, full_gradients = step(ROWS)
    changed = (full["ce_echo"] - full["ce_plain_routed"]).abs()
    assert changed > 1e-6, "the echo changes nothing, so the comparison would mean nothing"
    # Most families normalise and route in float32 whatever the model's dtype.
    tolerance = 2e-5 if dtype is torch.float64 else 2e-4
    can_checkpoint = getattr(model.get_base_model(), "supports_gradient_checkpointing", False)
    for checkpointing in (False, True) if can_checkpoint else (False,):
        if checkpointing:
            model.enable_input_require_grads()
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        form = choose()
        if not checkpointing and not form.runs_suffixes:
            continue  # the same once more
        chosen, gradients = step(form)
        for name in ("objective", "ce_plain", "ce_echo", "kd"):
            torch.testing.assert_close(chosen[name], full[name], rtol=tolerance, atol=tolerance)
        assert_same_gradients(full_gradients, gradients, tolerance)
