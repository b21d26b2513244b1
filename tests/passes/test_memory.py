"""What an echo step keeps for backward, counted, and the suffix pass that keeps next to nothing."""

import dataclasses

import pytest
import torch
from mixes import LLAMA_7B, examples_of
from models import adapted, tiny_model
from steps import (
    PAPER,
    assert_same_gradients,
    echo_setup,
    packed_example,
    padded_collator,
    padding_free_collator,
    planned_batch,
    random_examples,
    step_gradients,
)
from training import echo_trainer, losses
from transformers import LlamaConfig, LlamaForCausalLM

from echo_trainer.bench.counted import CountedBytes
from echo_trainer.method import grouping
from echo_trainer.method.plan import make_plan
from echo_trainer.method.segments import find_segments
from echo_trainer.passes.echo import RECOMPUTED
from echo_trainer.passes.memory import explain_out_of_memory
from echo_trainer.passes.proof import prove
from echo_trainer.passes.step import echo_step
from echo_trainer.run.collate import EchoCollator
from echo_trainer.run.memory_choice import computes_again
from echo_trainer.run.proof_rows import no_trace, proof_inputs


def checkpoint_layers(model):
    model.enable_input_require_grads()
    model.get_base_model().activation_checkpointing_enable()


def recomputed(plan):
    """The plan of a pass over suffixes that computes again in backward."""
    return dataclasses.replace(plan, form=RECOMPUTED, layout=dataclasses.replace(plan.layout, recompute=True))


def llama_7b_small(checkpointing):
    """LLaMA-7B's proportions (multi-head attention, 2.7 times as wide inside), narrow and of 16 layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=172, num_hidden_layers=16, num_attention_heads=4
    )
    model = adapted(LlamaForCausalLM._from_config(config, attn_implementation="sdpa"), r=4).train()
    if checkpointing:
        checkpoint_layers(model)
    return model, echo_setup(model, bottleneck=4)


def saved_bytes(setup, batch, plan):
    """Bytes that somebody holds between the forward and the backward pass of a step."""
    with CountedBytes() as counted:
        objective = echo_step(setup, PAPER, dict(batch), plan)["objective"]
        held = counted.held
    objective.backward()
    return held


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_an_echo_step_keeps_at_most_a_tenth_more_than_plain_lora(packed, checkpointing):
    """256 + 16 tokens, every sample routed. Kept whole, the echo's keys and values alone are 1.4 times as much."""
    _, setup = llama_7b_small(checkpointing)
    examples, collator = examples_of([256] * 4, [16] * 4), None
    if packed:
        examples, collator = [packed_example(examples)], padding_free_collator()
    batch, plan = planned_batch(examples, suffix=True, p=0.0, collator=collator)
    plain = saved_bytes(setup, batch, plan)
    batch, plan = planned_batch(examples, suffix=True, collator=collator)
    assert saved_bytes(setup, batch, recomputed(plan)) <= 1.10 * plain
    assert saved_bytes(setup, batch, plan) > (2.0 if checkpointing else 1.05) * plain


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("form", ["padded", "multi-turn", "packed", "dora"])
def test_computed_again_equals_the_full_pass(form, family, checkpointing, monkeypatch):
    """Losses and every gradient, in several passes over suffixes."""
    monkeypatch.setattr(grouping, "PASS", 0)
    model = adapted(tiny_model(family, dtype=torch.float64), use_dora=form == "dora").to(torch.float64).train()
    if checkpointing:
        checkpoint_layers(model)
    setup = echo_setup(model)
    examples = random_examples(5, seed=4, turns=2 if form == "multi-turn" else 1)
    collator = padding_free_collator() if form == "packed" else None
    if form == "packed":
        examples = [packed_example(examples[:3]), packed_example(examples[3:])]
    batch, full = planned_batch(examples, suffix=False, collator=collator)
    expected, expected_gradients = step_gradients(model, setup, batch, full)
    batch, plan = planned_batch(examples, suffix=True, collator=collator)
    found, gradients = step_gradients(model, setup, batch, recomputed(plan))
    for name in ("objective", "ce_echo", "kd"):
        torch.testing.assert_close(found[name], expected[name], rtol=2e-6, atol=2e-6)
    assert_same_gradients(expected_gradients, gradients, 2e-6)
    for module in model.modules():
        assert not module._forward_pre_hooks and "forward" not in vars(module)


@pytest.mark.parametrize("prompts", [[1, 1, 1], [1, 1, 7]], ids=["no prefix", "a part without"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_parts_whose_suffixes_begin_at_the_first_token(family, prompts, monkeypatch):
    """An echo at a boundary that is the first token: there is no prefix to compute again."""
    monkeypatch.setattr(grouping, "PASS", 0)
    model = adapted(tiny_model(family, dtype=torch.float64)).to(torch.float64).train()
    checkpoint_layers(model)
    setup = echo_setup(model)
    examples, found = examples_of(prompts, [3, 3, 6]), []
    for suffix in (False, True):
        batch, plan = planned_batch(examples, suffix=suffix, positions="predicting")
        found.append(step_gradients(model, setup, batch, recomputed(plan) if suffix else plan))
    assert 0 in [len(part.prefix_n) for part in plan.layout.parts]
    torch.testing.assert_close(found[1][0]["objective"], found[0][0]["objective"], rtol=2e-6, atol=2e-6)
    assert_same_gradients(found[0][1], found[1][1], 2e-6)


def test_parts_that_run_for_other_processes_are_computed_again():
    """Where parameters are sharded, a process with fewer lengths runs parts of one token without a prefix."""
    model = adapted(tiny_model(dtype=torch.float64)).to(torch.float64).train()
    checkpoint_layers(model)
    setup = echo_setup(model)
    batch, plan = planned_batch(random_examples(3), suffix=True)
    expected, gradients = step_gradients(model, setup, batch, plan)
    segments = find_segments(padded_collator()(random_examples(3)))
    filled = make_plan(segments, [True] * 3, form=RECOMPUTED, n_parts=5, lockstep=True)
    assert filled.layout.n_idle >= 2
    found, others = step_gradients(model, setup, batch, filled)
    torch.testing.assert_close(found["objective"], expected["objective"], rtol=2e-6, atol=2e-6)
    assert_same_gradients(gradients, others, 2e-6)


@pytest.mark.parametrize(
    ("family", "names"), [("llama", ["self_attn.q_proj"]), ("gpt2", []), ("phi3", []), ("qwen3", ["self_attn.q_proj"])]
)
def test_what_keys_do_not_need_is_found_by_trying(family, names):
    """The proof of the pass that computes again finds it; a fused projection is needed."""
    model = adapted(tiny_model(family)).train()
    checkpoint_layers(model)
    setup = echo_setup(model)
    collator = EchoCollator(padding_free_collator())
    draft = collator.draft_with_all(random_examples(4, seed=2))
    with no_trace(model):
        result = prove(setup, *proof_inputs(draft, RECOMPUTED, collator, "cpu"))
    assert result.agrees and result.compared
    assert setup.unneeded == names


def test_a_run_that_computes_again(tmp_path):
    """The losses of a run that keeps all, to rounding; said in its record."""
    settings = {"max_steps": 3, "optim": "sgd"}
    again = echo_trainer(tmp_path / "again", echo_memory="recompute", **settings)
    again.train()
    kept = echo_trainer(tmp_path / "kept", echo_memory="store", **settings)
    kept.train()
    assert [record["pass"] for record in again.pass_choice.records()] == ["suffix, recomputed"]
    assert [record["pass"] for record in kept.pass_choice.records()] == ["suffix"]
    torch.testing.assert_close(losses(again), losses(kept), rtol=1e-5, atol=0)


def test_auto_computes_again_where_much_would_be_kept():
    """Beside what plain LoRA keeps and beside the weights; models whose keys are few keep them."""
    setup = echo_setup(adapted(tiny_model()))
    for checkpointing in (False, True):
        model = dataclasses.replace(LLAMA_7B, checkpointing=checkpointing)
        assert computes_again("auto", setup, model, 8 * 1024) is checkpointing
        assert not computes_again("auto", setup, model, 16)
        assert not computes_again("store", setup, model, 8 * 1024)
        assert computes_again("recompute", setup, model, 1)
    one_head = dataclasses.replace(LLAMA_7B, key_values=256)
    assert not computes_again("auto", setup, one_head, 8 * 1024)
    assert not computes_again("auto", setup, LLAMA_7B, 8 * 1024, engine_gathers=True)
    with pytest.raises(ValueError, match=r"echo_memory='recompute' cannot be had.*ZeRO-3.*echo_memory='store'"):
        computes_again("recompute", setup, LLAMA_7B, 1, engine_gathers=True)


def test_the_note_on_memory_knows_the_layout():
    batch, plan = planned_batch(examples_of([9, 9], [5, 3]), suffix=True)

    def note(plan):
        with pytest.raises(MemoryError) as raised, explain_out_of_memory(batch, plan, "echo pass"):
            raise MemoryError
        return "".join(raised.value.__notes__)

    assert "runs 8 tokens (6 without padding) in 1 passes over suffixes, after 18 prompt tokens" in note(plan)
    assert "echo_memory='recompute'" in note(plan)
    assert "computed again in backward" in note(recomputed(plan))
    assert "echo_memory='recompute'" not in note(recomputed(plan))
    _, full = planned_batch(examples_of([9, 9], [5, 3]), suffix=False)
    assert "which runs whole rows again" in note(full)
