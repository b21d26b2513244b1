"""Counted floating-point operations of a training step against plain LoRA in `SFTTrainer`."""

from functools import cache

import pytest
import torch
from models import lora_config
from peft import get_peft_model
from steps import echo_setup, padded_collator, planned_batch, step_gradients
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from echo_trainer.compat.flops import flop_counter

# SmolLM2's proportions at a quarter of its width; 16 layers so that default sources and targets are several.
SHAPE = {
    "vocab_size": 4096, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 16,
    "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 1024,
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return adapted_model()


@pytest.fixture(scope="module")
def plain(model):
    """FLOPs of plain LoRA on a row of prompt and answer tokens; each is counted once, and rows are alike."""
    return cache(lambda prompt, answer: plain_lora_flops(model, examples(1, prompt, answer)))


def adapted_model():
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model = get_peft_model(base, lora_config(r=16, lora_alpha=32))
    return model.train()


def examples(rows, prompt, answer):
    ids = list(range(2, 2 + prompt + answer))
    return [{"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]} for _ in range(rows)]


def plain_lora_flops(model, rows):
    """A forward and backward of plain LoRA, the head on answer positions only, as TRL computes it on a GPU."""
    batch, plan = planned_batch(rows, suffix=True, p=0.0)
    assert plan.layout is None
    setup = echo_setup(model)
    with flop_counter() as counter:
        step_gradients(model, setup, batch, plan)
    return counter.get_total_flops()


def echo_flops(model, rows, suffix, p=1.0, seed=0):
    setup = echo_setup(model, bottleneck=64)
    batch, plan = planned_batch(rows, suffix=suffix, p=p, seed=seed)
    with flop_counter() as counter:
        step_gradients(model, setup, batch, plan)
    return counter.get_total_flops(), plan.n_routed / len(rows)


def test_plain_count_is_at_most_that_of_sft_trainer():
    """The denominator is not flattered: TRL's fused forward on the same batch counts at least as much."""
    model = adapted_model()
    rows = examples(4, 128, 8)
    ours = plain_lora_flops(model, rows)
    add_fused_lm_head(model.get_base_model())
    batch = padded_collator()(rows)
    with flop_counter() as counter:
        model(**batch, fused_lm_head=True, use_cache=False).loss.backward()
    assert ours <= counter.get_total_flops()


def test_short_answers(model, plain):
    """128 prompt + 8 answer tokens, every sample routed: suffix at most 1.12 x plain LoRA, full about 2 x."""
    rows = examples(2, 128, 8)
    assert plain_lora_flops(model, rows) == 2 * plain(128, 8)
    suffix, full = (echo_flops(model, rows, suffix)[0] / (2 * plain(128, 8)) for suffix in (True, False))
    assert 1.0 < suffix <= 1.12
    assert 1.95 < full < 2.1


@pytest.mark.parametrize(("prompt", "answer"), [(128, 64), (64, 128), (256, 256)])
@pytest.mark.parametrize("p", [1.0, 0.5])
def test_long_answers(model, plain, prompt, answer, p):
    """The price of the echo is the routed share of the answers."""
    n = 1 if p == 1 else 2
    flops, routed = echo_flops(model, examples(n, prompt, answer), True, p=p)
    assert routed == p
    ratio = flops / (n * plain(prompt, answer))
    assert ratio <= 1 + routed * answer / (prompt + answer) + 0.03
