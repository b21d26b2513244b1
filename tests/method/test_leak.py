"""Invariant 6: a token after a span never changes that span's echo logits."""

import pytest
import torch
from models import adapted, tiny_model
from steps import echo_setup, packed_example, padding_free_collator, planned_batch, random_examples

from echo_trainer.passes.echo import run_echo_pass
from echo_trainer.passes.plain import run_plain_pass


def echo_states(model, setup, examples, suffix, collator, positions):
    """Final states of the echo pass by position of the flattened batch."""
    batch, plan = planned_batch(examples, suffix=suffix, collator=collator, positions=positions)
    with torch.no_grad():
        plain = run_plain_pass(setup, batch, plan)
        delta, _ = setup.networks(plain.source_SGd)
        echo, _ = run_echo_pass(setup, batch, plan, plain, delta)
    return dict(zip(plan.predict_N[plan.reach_E].tolist(), echo, strict=True))


@pytest.mark.parametrize("positions", ["answer", "predicting"])
@pytest.mark.parametrize("suffix", [False, True], ids=["full", "suffix"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_later_tokens_do_not_reach_a_span(dora, packed, suffix, positions):
    model = adapted(tiny_model(dtype=torch.float64), use_dora=dora).to(torch.float64)
    setup = echo_setup(model, sources=[3, 4], targets=[0, 1])
    examples = random_examples(3, seed=1, turns=3)
    changed = [dict(example) for example in examples]
    # Change everything after the first answer of the second example: a later prompt, its boundary, later answers.
    labels = examples[1]["labels"]
    first = next(t for t, label in enumerate(labels) if label != -100)
    end = next(t for t in range(first, len(labels)) if labels[t] == -100)
    ids = examples[1]["input_ids"]
    changed[1]["input_ids"] = ids[:end] + [2 + (token + 7) % 50 for token in ids[end:]]
    changed[1]["labels"] = [PROMPT if x == PROMPT else i for x, i in zip(labels, changed[1]["input_ids"], strict=True)]
    collator = padding_free_collator() if packed else None
    wrap = (lambda rows: [packed_example(rows)]) if packed else (lambda rows: rows)

    before = echo_states(model, setup, wrap(examples), suffix, collator, positions)
    after = echo_states(model, setup, wrap(changed), suffix, collator, positions)
    start = len(examples[0]["input_ids"]) if packed else max(len(e["input_ids"]) for e in examples)
    of_span = [p for p in before if start <= p < start + end - 1]
    later = [p for p in before if start + end <= p < start + len(labels)]
    assert of_span and later
    for position in of_span:
        torch.testing.assert_close(after[position], before[position], rtol=1e-12, atol=1e-12)
    assert any(not torch.allclose(after[position], before[position], atol=1e-3) for position in later)


PROMPT = -100
