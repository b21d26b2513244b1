"""Invariant 2: suffix pass = full pass, for every family and form of batch, with and without checkpointing."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixes import examples_of
from models import FAMILIES, adapted, tiny_model
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
from transformers.utils import is_flash_attn_2_available

from echo_trainer.method import grouping
from echo_trainer.method.layouts import FullLayout, SuffixLayout
from echo_trainer.method.plan import make_plan
from echo_trainer.method.segments import find_segments
from echo_trainer.passes.echo import ROWS, SUFFIX

# Sums of float64 in another order; most families normalise in float32 whatever the model's dtype.
TOLERANCE = {"gpt2": 1e-9, "opt": 1e-9, "gpt_neox": 1e-9}
FLOAT32_NORM = 2e-6


def float64_model(family, **lora):
    if family == "gemma2":  # soft-capped attention exists in eager mode only
        model = tiny_model(family, attention="eager", dtype=torch.float64)
    else:
        model = tiny_model(family, dtype=torch.float64)
    return adapted(model, **lora).to(torch.float64)


def checkpoint_layers(model):
    model.enable_input_require_grads()
    model.get_base_model().activation_checkpointing_enable()


def compare(model, examples, collator=None, positions="answer", p=1.0, tolerance=FLOAT32_NORM, **setup_options):
    setup = echo_setup(model, **setup_options)
    results = []
    for suffix, layout in ((False, FullLayout), (True, SuffixLayout)):
        batch, plan = planned_batch(examples, suffix=suffix, positions=positions, p=p, collator=collator, seed=1)
        assert isinstance(plan.layout, layout)
        results.append(step_gradients(model, setup, batch, plan))
    (full, full_gradients), (suffix, suffix_gradients) = results
    for name in ("objective", "ce_plain", "ce_echo", "kd", "agreement"):
        torch.testing.assert_close(suffix[name], full[name], rtol=tolerance, atol=tolerance)
    assert full["kd"] > 1e-4, "the echo changes nothing, so the comparison would mean nothing"
    assert_same_gradients(full_gradients, suffix_gradients, tolerance)
    return full_gradients


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("positions", ["answer", "predicting"])
@pytest.mark.parametrize("family", FAMILIES)
def test_suffix_equals_full(family, positions, checkpointing):
    model = float64_model(family)
    if checkpointing:
        checkpoint_layers(model)
    model.train()
    examples = random_examples(4, seed=2, low=8, high=14)
    compare(model, examples, positions=positions, tolerance=TOLERANCE.get(family, FLOAT32_NORM))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("form", ["multi-turn", "padding-free", "packed", "one-prompt-length", "some-routed"])
def test_every_batch_form(form, dora, family, checkpointing):
    model = float64_model(family, use_dora=dora)
    if checkpointing:
        checkpoint_layers(model)
    model.train()
    examples = random_examples(5, seed=4, turns=2 if form in ("multi-turn", "packed") else 1)
    collator = padding_free_collator() if form in ("padding-free", "packed") else None
    if form == "packed":
        examples = [packed_example(examples[:3]), packed_example(examples[3:])]
    if form == "one-prompt-length":
        examples = random_examples(4, low=5, high=6)
    compare(model, examples, collator=collator, p=0.5 if form == "some-routed" else 1.0)


@pytest.fixture
def passes_cost_nothing(monkeypatch):
    """Every length becomes a part of its own, also in small batches."""
    monkeypatch.setattr(grouping, "PASS", 0)


@pytest.mark.usefixtures("passes_cost_nothing")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("form", ["padded", "multi-turn", "padding-free", "packed", "some-routed"])
def test_many_parts(form, dora, checkpointing):
    """Rows of very different lengths run in several passes: one graph, the losses and gradients of the full pass."""
    model = float64_model("llama", use_dora=dora)
    if checkpointing:
        checkpoint_layers(model)
    model.train()
    examples, collator = batch_in(form)
    _, plan = planned_batch(examples, suffix=True, p=0.5 if form == "some-routed" else 1.0, collator=collator, seed=1)
    assert plan.n_parts > 1
    compare(model, examples, collator=collator, p=0.5 if form == "some-routed" else 1.0)


def batch_in(form):
    """Examples of very different lengths and the collator of a form of batch."""
    low, high = random_examples(4, seed=4, turns=2), random_examples(3, seed=5, low=14, high=30)
    examples = [*low[:2], *high, *low[2:]]
    if form == "packed":
        return [packed_example(examples[:4]), packed_example(examples[4:])], padding_free_collator()
    if form in ("multi-turn", "some-routed"):
        return low, None
    return examples, padding_free_collator() if form == "padding-free" else None


@pytest.mark.usefixtures("passes_cost_nothing")
@pytest.mark.parametrize("family", FAMILIES)
def test_many_parts_of_every_family(family):
    """Sliding windows, learned positions, soft-capping: each part is a batch like any other."""
    model = float64_model(family).train()
    examples = [*random_examples(3, seed=4, low=6, high=9), *random_examples(2, seed=5, low=10, high=14)]
    assert planned_batch(examples, suffix=True)[1].n_parts > 1
    compare(model, examples, tolerance=TOLERANCE.get(family, FLOAT32_NORM))


document = st.tuples(st.integers(1, 24), st.integers(1, 24))


@functools.cache
def three_layers():
    model = adapted(tiny_model(num_hidden_layers=3, dtype=torch.float64)).to(torch.float64).train()
    return model, echo_setup(model, sources=[2], targets=[0])


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(document, min_size=1, max_size=7),
    packed=st.booleans(),
    predicting=st.booleans(),
    price=st.sampled_from([0, 30]),
    n_parts=st.sampled_from([None, 1, 3]),
)
def test_any_lengths(documents, packed, predicting, price, n_parts):
    """Suffix pass = full pass, whatever the lengths of prompts and answers and however many passes they run in."""
    model, setup = three_layers()
    examples = examples_of(*zip(*documents, strict=True))
    batch = padding_free_collator()([packed_example(examples)]) if packed else padded_collator()(examples)
    segments = find_segments(batch, examples if not packed else [packed_example(examples)])
    options = {
        "positions": "predicting" if predicting else "answer", "position_ids": batch.get("position_ids"), "n_parts":
        n_parts,
    }  # fmt: skip
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    before, grouping.PASS = grouping.PASS, price
    try:
        full, suffix = (
            make_plan(segments, [True] * segments.n_documents, form=form, **options) for form in (ROWS, SUFFIX)
        )
    finally:
        grouping.PASS = before
    if suffix.layout is None:
        return
    assert n_parts is None or suffix.n_parts == n_parts
    (one, one_gradients), (other, other_gradients) = (
        step_gradients(model, setup, inputs, plan) for plan in (full, suffix)
    )
    torch.testing.assert_close(other["objective"], one["objective"], rtol=FLOAT32_NORM, atol=FLOAT32_NORM)
    assert_same_gradients(one_gradients, other_gradients, FLOAT32_NORM)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_bfloat16_autocast(dora):
    """Under autocast both passes round to bfloat16, so they agree to its precision."""
    model = adapted(tiny_model(), use_dora=dora).train()
    setup = echo_setup(model)
    examples = random_examples(4, seed=2)
    (full, full_gradients), (suffix, suffix_gradients) = (
        step_gradients(model, setup, *planned_batch(examples, suffix=suffix), autocast=True)
        for suffix in (False, True)
    )
    torch.testing.assert_close(suffix["objective"], full["objective"], rtol=0.01, atol=0)
    flat = [torch.cat([g.flatten() for g in gradients.values()]) for gradients in (full_gradients, suffix_gradients)]
    assert torch.cosine_similarity(*flat, dim=0) > 0.99


@pytest.mark.skipif(
    not (torch.cuda.is_available() and is_flash_attn_2_available()), reason="needs a GPU and flash-attn"
)
@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_flash_attention(family, form):
    """Flash attention reads the suffix as a continuation of left-padded prompts; bfloat16, so to its precision."""
    model = adapted(tiny_model(family, attention="flash_attention_2", dtype=torch.bfloat16).cuda()).cuda().train()
    setup = echo_setup(model)
    setup.networks.cuda()
    examples, collator = random_examples(4, seed=2, low=8, high=14), None
    if form == "packed":
        examples, collator = [packed_example(examples)], padding_free_collator()
    gradients = []
    for suffix in (False, True):
        batch, plan = planned_batch(examples, suffix=suffix, collator=collator)
        batch = {k: v.cuda() if torch.is_tensor(v) else v for k, v in batch.items()}
        gradients.append(step_gradients(model, setup, batch, plan.to("cuda"))[1])
    flat = [torch.cat([g.float().flatten() for g in tensors.values()]) for tensors in gradients]
    assert torch.cosine_similarity(*flat, dim=0) > 0.99


def test_layers_below_the_first_target_run_once():
    model = float64_model("llama").train()
    setup = echo_setup(model, sources=[4], targets=[2])
    calls = []
    for index, layer in enumerate(model.get_base_model().model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: calls.append(index))
    step_gradients(model, setup, *planned_batch(random_examples(), suffix=True))
    assert sorted(calls) == [0, 1, 2, 2, 3, 3, 4, 4]
    compare(model, random_examples(), sources=[4], targets=[2])


def test_passes_leave_no_trace_on_the_model():
    """Hooks, caches and skipped layers end with the pass, also when it fails in the middle."""
    model = float64_model("llama").train()
    setup = echo_setup(model)
    batch, plan = planned_batch(random_examples(), suffix=True)
    before = {name: (dict(vars(module)), len(module._forward_hooks)) for name, module in model.named_modules()}
    step_gradients(model, setup, batch, plan)
    norm = model.get_base_model().model.norm
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 2:  # the first call is the plain pass
            raise RuntimeError("out of memory")

    handle = norm.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        step_gradients(model, setup, batch, plan)
    handle.remove()
    for name, module in model.named_modules():
        attributes, hooks = before[name]
        assert vars(module).keys() == attributes.keys(), name
        assert len(module._forward_hooks) == hooks == 0, name
        assert not module._forward_pre_hooks, name
