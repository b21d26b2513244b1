"""Invariant 8: loss and every gradient against an independent reference that is written with loops."""

import pytest
import reference
import torch
from models import adapted, tiny_model
from steps import (
    assert_same_gradients,
    echo_setup,
    packed_example,
    padding_free_collator,
    planned_batch,
    random_examples,
    step_gradients,
)

from echo_trainer.method import losses
from echo_trainer.method.losses import EchoLoss
from echo_trainer.method.routing import uniform
from echo_trainer.method.sites import site_key
from echo_trainer.run.collate import EchoCollator

TEACHERS = ["echo", "plain", "mutual"]


def reference_gradients(model, setup, documents, routed, **options):
    model.zero_grad()
    setup.networks.zero_grad()
    model.eval()  # there is no dropout; this switches checkpointing off
    total = reference.loss(model.get_base_model(), setup, documents, routed, site_key, **options)
    total.backward()
    model.train()
    named = {**dict(model.named_parameters()), **{f"echo.{n}": p for n, p in setup.networks.named_parameters()}}
    return total.detach(), {n: p.grad.clone() for n, p in named.items() if p.requires_grad and p.grad is not None}


def documents_of(examples):
    """(ids, labels) of every document; packed examples hold several."""
    found = []
    for example in examples:
        start = 0
        for length in example.get("seq_lengths", [len(example["input_ids"])]):
            span = slice(start, start + length)
            found.append((example["input_ids"][span], example["labels"][span]))
            start += length
    return found


@pytest.mark.parametrize("suffix", [False, True], ids=["full", "suffix"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("form", ["padded", "multi-turn", "packed"])
def test_step_equals_reference(form, checkpointing, dora, suffix):
    model = adapted(tiny_model("llama", dtype=torch.float64), use_dora=dora).to(torch.float64).train()
    if checkpointing:
        model.enable_input_require_grads()
        model.get_base_model().activation_checkpointing_enable()
    setup = echo_setup(model)
    examples = random_examples(5, seed=8, turns=1 if form == "padded" else 2)
    # An answer without a prompt, and a prompt of one token: the first is never routed, the second is.
    examples[0] = {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}
    examples[1] = {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}
    collator = None
    if form == "packed":
        examples, collator = [packed_example(examples[:3]), packed_example(examples[3:])], padding_free_collator()
    p = 0.6
    batch, plan = planned_batch(examples, suffix=suffix, p=p, collator=collator, seed=2)
    output, gradients = step_gradients(model, setup, batch, plan, EchoLoss(0.7, 3.0, "mutual"))

    documents = documents_of(examples)
    # The packed collator cannot be asked which document is which; the order of the list says it.
    places = [
        (row, number) for row, example in enumerate(examples) for number in range(len(example.get("seq_lengths", [0])))
    ]
    routed = [uniform(2, row, number) < p for row, number in places]
    assert any(routed[1:]) and not all(routed), "choose another seed: the test needs routed and unrouted documents"
    expected, expected_gradients = reference_gradients(
        model, setup, documents, routed, kd_weight=0.7, tau=3.0, teacher="mutual", predicting=False
    )
    torch.testing.assert_close(output["objective"].detach(), expected, rtol=1e-6, atol=0)
    assert_same_gradients(expected_gradients, gradients, 5e-6)


@pytest.mark.parametrize("positions", ["answer", "predicting"])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_options_equal_reference(teacher, positions):
    model = adapted(tiny_model("gpt_neox", dtype=torch.float64)).to(torch.float64).train()
    setup = echo_setup(model, sources=[2, 4], targets=[0, 1])
    examples = random_examples(3, seed=9)
    batch, plan = planned_batch(examples, suffix=True, positions=positions)
    output, gradients = step_gradients(model, setup, batch, plan, EchoLoss(1.3, 1.5, teacher))
    expected, expected_gradients = reference_gradients(
        model,
        setup,
        documents_of(examples),
        [True] * 3,
        kd_weight=1.3,
        tau=1.5,
        teacher=teacher,
        predicting=positions == "predicting",
    )
    torch.testing.assert_close(output["objective"].detach(), expected, rtol=1e-12, atol=0)
    assert_same_gradients(expected_gradients, gradients, 1e-8)


VARIANTS = {
    "no gate": ({"gate": "none"}, "sum"),
    "gate bias": ({"gate_bias": 0.5}, "sum"),
    "with its graph": ({"detach": False}, "sum"),
    "mean": ({}, "mean"),
    "strong": ({"gate": "none", "detach": False, "sources": [3], "targets": [2]}, "mean"),
}


@pytest.mark.parametrize("suffix", [False, True], ids=["full", "suffix"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_equal_reference(variant, form, dora, suffix):
    """Gate, graph of z and weight of the loss, alone and together; some documents routed, two turns in each."""
    assert_equals_reference(*VARIANTS[variant], form, suffix, use_dora=dora)


@pytest.mark.parametrize("suffix", [False, True], ids=["full", "suffix"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_graph_of_the_echo_under_checkpointing(family, suffix):
    assert_equals_reference(*VARIANTS["strong"], "padded", suffix, family=family, checkpointing=True)


@pytest.mark.parametrize("suffix", [False, True], ids=["full", "suffix"])
@pytest.mark.parametrize("variant", ["with its graph", "strong"])
def test_adapter_on_a_part_of_the_layers(variant, suffix):
    """LoRA on the upper three of five layers: sources lie just above the targets, and the graph of z ends below."""
    upper = {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [2, 3, 4], "layers_pattern": "layers"}
    assert_equals_reference(*VARIANTS[variant], "padded", suffix, **upper)


def assert_equals_reference(options, reduction, form, suffix, *, family="llama", checkpointing=False, **lora):
    """Loss and every gradient of a step whose documents are routed with probability 0.6."""
    model = adapted(tiny_model(family, dtype=torch.float64), **lora).to(torch.float64).train()
    if checkpointing:
        model.enable_input_require_grads()
        model.get_base_model().activation_checkpointing_enable()
    setup = echo_setup(model, **options)
    examples, collator = random_examples(5, seed=8, turns=2), None
    if form == "packed":
        examples, collator = [packed_example(examples[:3]), packed_example(examples[3:])], padding_free_collator()
    batch, plan = planned_batch(examples, suffix=suffix, p=0.6, collator=collator, seed=2)
    output, gradients = step_gradients(model, setup, batch, plan, EchoLoss(0.7, 3.0, "mutual", reduction))
    routed = [
        uniform(2, row, n) < 0.6 for row, e in enumerate(examples) for n in range(len(e.get("seq_lengths", [0])))
    ]
    assert any(routed) and not all(routed), "choose another seed: the test needs routed and unrouted documents"
    given = {"detach": options.get("detach", True), "reduction": reduction, "predicting": False}
    expected, expected_gradients = reference_gradients(
        model, setup, documents_of(examples), routed, kd_weight=0.7, tau=3.0, teacher="mutual", **given
    )
    coarse = family == "llama"  # its norm computes in float32
    torch.testing.assert_close(output["objective"].detach(), expected, rtol=1e-6 if coarse else 1e-12, atol=0)
    assert_same_gradients(expected_gradients, gradients, 5e-6 if coarse else 1e-8)


def test_the_graph_of_the_echo_matters():
    """Otherwise the tests above could pass without it: below the source layer the gradients are others."""
    model = adapted(tiny_model(dtype=torch.float64)).to(torch.float64).train()
    batch, plan = planned_batch(random_examples(3, seed=9), suffix=True)
    found = [step_gradients(model, echo_setup(model, detach=detach), batch, plan)[1] for detach in (True, False)]
    changed = {n for n in found[0] if (found[0][n] - found[1][n]).abs().max() > 1e-6 * found[0][n].abs().max()}
    assert changed and all("lora_" in name for name in changed)
    assert {int(name.split("layers.")[1].split(".")[0]) for name in changed} == {0, 1, 2, 3, 4}  # source 4, targets 1


@pytest.mark.parametrize("p", [1.0, 0.5])
def test_an_echo_of_zero_in_the_mean_is_plain_lora(p):
    """Loss and gradients of the adapter; with "sum" every routed sample would count twice."""
    model = adapted(tiny_model(dtype=torch.float64)).to(torch.float64).train()
    setup = echo_setup(model, alive=False)
    examples = random_examples(5, seed=3)
    plain, expected = step_gradients(model, setup, *planned_batch(examples, suffix=True, p=0.0))
    batch, plan = planned_batch(examples, suffix=True, p=p, seed=1)
    assert len(plan.reach_E)
    mean, gradients = step_gradients(model, setup, batch, plan, EchoLoss(1.0, 2.0, "echo", "mean"))
    torch.testing.assert_close(mean["objective"], plain["objective"], rtol=1e-12, atol=0)
    ours = {name: g for name, g in gradients.items() if not name.startswith("echo.")}
    assert_same_gradients({name: expected[name] for name in ours}, ours, 1e-6)
    twice, _ = step_gradients(model, setup, batch, plan)
    assert twice["objective"] > 1.2 * plain["objective"]


def test_chunks_do_not_change_the_objective(monkeypatch):
    model = adapted(tiny_model("gpt_neox", dtype=torch.float64)).to(torch.float64).train()
    setup = echo_setup(model)
    batch, plan = planned_batch(random_examples(5, seed=3), suffix=True, p=0.5, seed=1)
    whole, whole_gradients = step_gradients(model, setup, batch, plan)
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 3 * 60)  # three positions at a time
    chunked, chunked_gradients = step_gradients(model, setup, batch, plan)
    for name, value in whole.items():
        torch.testing.assert_close(chunked[name], value, rtol=1e-12, atol=1e-12)
    assert_same_gradients(whole_gradients, chunked_gradients, 1e-9)


def test_trained_head_gets_its_gradient():
    """`modules_to_save=["lm_head"]` trains the head; its gradient comes through the chunks."""
    model = adapted(tiny_model("llama", dtype=torch.float64), modules_to_save=["lm_head"]).to(torch.float64).train()
    setup = echo_setup(model)
    examples = random_examples(3, seed=9)
    output, gradients = step_gradients(model, setup, *planned_batch(examples, suffix=True))
    expected, expected_gradients = reference_gradients(
        model, setup, documents_of(examples), [True] * 3, kd_weight=1.0, tau=2.0, teacher="echo", predicting=False
    )
    assert any("lm_head" in name for name in gradients)
    torch.testing.assert_close(output["objective"].detach(), expected, rtol=1e-6, atol=0)
    assert_same_gradients(expected_gradients, gradients, 5e-6)


def test_weighted_aggregation_starts_as_the_mean_and_learns():
    model = adapted(tiny_model("llama")).train()
    batch, plan = planned_batch(random_examples(), suffix=True)
    mean = echo_setup(model, sources=[3, 4], targets=[0])
    weighted = echo_setup(model, sources=[3, 4], targets=[0], aggregation="weighted")
    weighted.networks.source_logits.data.zero_()
    expected, _ = step_gradients(model, mean, batch, plan)
    output, gradients = step_gradients(model, weighted, batch, plan)
    torch.testing.assert_close(output["objective"], expected["objective"])
    assert gradients["echo.source_logits"].abs().max() > 0


def test_routes_of_packed_documents_are_those_of_their_places():
    examples = [packed_example(random_examples(2, seed=1)), packed_example(random_examples(3, seed=2))]
    answers = EchoCollator(padding_free_collator())(examples).answers
    places = list(zip(answers.sample_D.tolist(), answers.number_D.tolist(), strict=True))
    assert places == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
