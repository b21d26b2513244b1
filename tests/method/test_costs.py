"""What a pass costs, computed from its layout, against what is counted while it runs."""

import dataclasses

import pytest
from mixes import LLAMA_7B, MIXES, examples_of
from models import adapted, tiny_model
from steps import echo_setup, packed_example, padded_collator, padding_free_collator, planned_batch, step_gradients
from transformers import LlamaConfig, LlamaForCausalLM

from echo_trainer.compat.flops import flop_counter
from echo_trainer.method import grouping
from echo_trainer.method.costs import ModelShape, echo_cost, whole_rows_cost, whole_rows_cost_less
from echo_trainer.method.plan import make_plan
from echo_trainer.method.segments import find_segments
from echo_trainer.passes.echo import SUFFIX
from echo_trainer.passes.shape import model_shape


def llama(**overrides):
    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4, **overrides
    )
    # Eager attention is made of products that torch's counter knows on a CPU, too.
    return adapted(LlamaForCausalLM._from_config(config, attn_implementation="eager"), r=1).train()


def suffix_plan(batch, examples=None, **options):
    segments = find_segments(batch, examples)
    return segments, make_plan(
        segments,
        [True] * segments.n_documents,
        form=SUFFIX,
        position_ids=batch.get("position_ids"),
        **options,
    )


def test_sizes_of_a_model():
    """A Llama of 7B's proportions, by hand."""
    setup = echo_setup(llama(num_key_value_heads=2))
    found = model_shape(setup, checkpointing=True)
    assert found == ModelShape(
        layers=4, first_target=setup.first_target, hidden=256, weights=2 * 256**2 + 2 * 256 * 128 + 3 * 256 * 688,
        activations=4 * 256 + 2 * (256 + 128) + 3 * (256 + 688), queries=256, key_values=2 * 128, itemsize=4,
        checkpointing=True,
    )  # fmt: skip
    gpt2 = echo_setup(adapted(tiny_model("gpt2")))
    assert model_shape(gpt2, False).weights == 12 * 32**2 and model_shape(gpt2, False).key_values == 64


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("suffix", [True, False], ids=["suffix", "full"])
def test_flops_are_those_that_are_counted(suffix, checkpointing, monkeypatch):
    """To a tenth: adapters, the echo networks and the head are left out. In several parts."""
    monkeypatch.setattr(grouping, "PASS", 0)
    model = llama()
    if checkpointing:
        model.enable_input_require_grads()
        model.get_base_model().activation_checkpointing_enable()
    setup = echo_setup(model, sources=[3], targets=[1], bottleneck=1)
    examples = examples_of([60, 30, 90, 12], [20, 40, 33, 9])
    counted = []
    for p in (0.0, 1.0):
        batch, plan = planned_batch(examples, suffix=suffix, p=p)
        with flop_counter() as counter:
            step_gradients(model, setup, batch, plan)
        counted.append(counter.get_total_flops())
    segments = find_segments(padded_collator()(examples))
    assert plan.n_parts == (4 if suffix else 0)
    cost = echo_cost(plan.layout, segments, model_shape(setup, checkpointing))
    assert cost.flops == pytest.approx(counted[1] - counted[0], rel=0.1)


@pytest.mark.parametrize("name", MIXES)
def test_suffixes_of_real_batches_cost_less(name):
    """Far less, padded or packed, on dense and on varlen kernels; with one pass for all rows they cost more."""
    examples = examples_of(*MIXES[name]())
    batch = padding_free_collator()([packed_example(examples)])
    segments, plan = suffix_plan(batch)
    for varlen in (False, True):
        model = dataclasses.replace(LLAMA_7B, varlen=varlen)
        assert not whole_rows_cost_less(plan, segments, model)
    if name == "packed-lognormal":
        one_pass = suffix_plan(batch, n_parts=1)[1]
        assert whole_rows_cost_less(one_pass, segments, dataclasses.replace(LLAMA_7B, varlen=True))


def test_whole_rows_cost_less_where_answers_are_all_there_is():
    """Answers from the second token on, of very different lengths, packed: suffixes run in several passes."""
    examples = examples_of([1] * 13, [2] * 12 + [60])
    batch = padding_free_collator()(examples)
    segments, plan = suffix_plan(batch, examples)
    assert plan.n_parts == 2
    assert whole_rows_cost_less(plan, segments, LLAMA_7B)
    # Not where the same documents have prompts that need not run again.
    examples = examples_of([200] * 13, [2] * 12 + [60])
    assert not whole_rows_cost_less(*suffix_plan(padding_free_collator()(examples), examples)[::-1], LLAMA_7B)


def test_nothing_to_compare():
    segments, plan = suffix_plan(padded_collator()(examples_of([3], [1])))
    assert plan.layout is None and not whole_rows_cost_less(plan, segments, LLAMA_7B)


def test_a_varlen_kernel_computes_pairs_of_one_document_only():
    segments, _ = suffix_plan(padding_free_collator()(examples_of([10, 20], [5, 5])), examples_of([10, 20], [5, 5]))
    dense, varlen = (
        whole_rows_cost(1, segments, dataclasses.replace(LLAMA_7B, varlen=varlen)).flops for varlen in (False, True)
    )
    assert dense - varlen == 32 * 16 * 4096 * (40**2 - 15**2 - 25**2)
