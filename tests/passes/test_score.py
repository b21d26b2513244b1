"""Cross-entropies of both passes position by position, against the reference that is written with loops."""

import pytest
import reference
import torch
from models import adapted, tiny_model
from steps import echo_setup, packed_example, padding_free_collator, planned_batch, random_examples, step_gradients

from echo_trainer.method.sites import site_key
from echo_trainer.passes import score
from echo_trainer.passes.score import ScoreTask, score_passes

FORMS = pytest.mark.parametrize("form", ["padded", "packed"])
SUFFIX = pytest.mark.parametrize("suffix", [False, True], ids=["full", "suffix"])


def scored(form, suffix, **options):
    model = adapted(tiny_model("gpt_neox", dtype=torch.float64)).to(torch.float64).eval()
    setup = echo_setup(model, sources=[3], targets=[0, 1])
    examples, collator = random_examples(4, seed=8, turns=2), None
    documents = [(e["input_ids"], e["labels"]) for e in examples]
    if form == "packed":
        examples, collator = [packed_example(examples[:2]), packed_example(examples[2:])], padding_free_collator()
    batch, plan = planned_batch(examples, suffix=suffix, collator=collator, **options)
    return setup, documents, batch, plan


@FORMS
@SUFFIX
@pytest.mark.parametrize("positions", ["answer", "predicting"])
def test_scores_equal_reference(form, suffix, positions):
    setup, documents, batch, plan = scored(form, suffix, positions=positions)
    found = score_passes(setup, dict(batch), ScoreTask(plan))
    expected = []
    for ids, labels in documents:
        plain, states = reference.logits_and_states(setup.model, ids)
        echoes, places = [], {}
        for number, (first, last) in enumerate(reference.spans(labels)):
            echoes.append(states[3][first - 1])
            places |= dict.fromkeys(range(first - (positions == "predicting"), last + 1), number)
        echo = reference.echo_logits(setup.model, setup.sites, setup.networks.networks, ids, echoes, places, site_key)
        for t in range(len(ids) - 1):
            if labels[t + 1] != -100:
                rows = [plain[t], echo[t]]
                expected.append(
                    [-float(reference.log_probabilities(row)[labels[t + 1]]) for row in rows]
                    + [int(row.argmax()) == labels[t + 1] for row in rows]
                )
    ours = torch.stack([x.double() for x in found[:4]], dim=1)
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert (found.ce_plain_N - found.ce_echo_N).abs().max() > 1e-3


@FORMS
@SUFFIX
@pytest.mark.parametrize("lent", [False, True], ids=["own batch", "lent"])
def test_scores_with_the_echoes_of_others_equal_reference(form, suffix, lent):
    """Turn by turn of the next document; or all with one echo of another batch."""
    setup, documents, batch, plan = scored(form, suffix)
    texts = [(ids, list(reference.spans(labels)), labels) for ids, labels in documents]
    states = [reference.logits_and_states(setup.model, ids)[1][3] for ids, _, _ in texts]
    sources = [[states[i][first - 1] for first, _ in spans] for i, (_, spans, _) in enumerate(texts)]
    assert all(len(mine) == 2 for mine in sources)
    partner, stranger = [2, 3, 4, 5, 6, 7, 0, 1], 0.5 * sources[0][0] - sources[1][1]
    task = ScoreTask(plan, torch.tensor([8] * 8 if lent else partner), stranger[None] if lent else None)
    found = score_passes(setup, dict(batch), task)
    expected = []
    for number, (ids, spans, labels) in enumerate(texts):
        echoes = [stranger, stranger] if lent else sources[(number + 1) % 4]
        places = {t: turn for turn, (first, last) in enumerate(spans) for t in range(first, last + 1)}
        logits = reference.echo_logits(
            setup.model, setup.sites, setup.networks.networks, ids, echoes, places, site_key
        )
        expected += [
            -float(reference.log_probabilities(logits[t])[labels[t + 1]])
            for t in range(len(ids) - 1)
            if labels[t + 1] != -100
        ]
    torch.testing.assert_close(found.ce_other_N, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    own = score_passes(setup, dict(batch), ScoreTask(plan))
    assert torch.equal(found.ce_echo_N, own.ce_echo_N) and torch.equal(found.ce_plain_N, own.ce_plain_N)
    assert (found.ce_other_N - found.ce_echo_N).abs().max() > 1e-3
    again = score_passes(setup, dict(batch), ScoreTask(plan, torch.arange(8)))
    assert torch.equal(again.ce_other_N, own.ce_echo_N)  # a second pass on what the first one left is the same


@FORMS
def test_sums_are_those_of_a_step_in_any_chunks(form, monkeypatch):
    setup, _, batch, plan = scored(form, True, p=0.5, seed=1)
    output, _ = step_gradients(setup.model, setup, batch, plan)
    whole = score_passes(setup, dict(batch), ScoreTask(plan))
    torch.testing.assert_close(whole.ce_plain_N.sum(), output["ce_plain"])
    routed = (output["ce_plain_routed"] - output["ce_echo"]).double()
    torch.testing.assert_close((whole.ce_plain_N - whole.ce_echo_N).sum(), routed)
    monkeypatch.setattr(score, "CHUNK_LOGITS", 3 * 60)
    for one, other in zip(whole[:4], score_passes(setup, dict(batch), ScoreTask(plan))[:4], strict=True):
        torch.testing.assert_close(one, other)


def test_nothing_to_predict_and_nothing_routed():
    setup, _, batch, plan = scored("padded", True, p=0.0)
    found = score_passes(setup, dict(batch), ScoreTask(plan))
    assert torch.equal(found.ce_plain_N, found.ce_echo_N) and len(found.ce_plain_N) == len(plan.labels_N)
