"""Writing with the echo: token for token what a computation of the whole sequence anew gives, with loops."""

import pytest
import reference
import torch
from models import adapted, tiny_model
from steps import echo_setup

from echo_trainer.method.sites import site_key
from echo_trainer.passes.generating import writing_with_echo

NEW = 7


def echoing(family, **form):
    """A model with an adapter and an echo that changes what is written."""
    model = adapted(tiny_model(family)).eval()
    setup = echo_setup(model, **form)
    for name, parameter in setup.networks.named_parameters():
        if name.endswith("scale"):
            parameter.data.fill_(2.0)
    return setup


def prompts(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (n,), generator=generator).tolist()
    return [torch.randint(2, 60, (length,), generator=generator).tolist() for length in lengths]


def padded(rows):
    """Padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def write(setup, rows, positions="answer", **options):
    """New tokens of each row, NEW of them."""
    batch = padded(rows)
    fixed = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad(), writing_with_echo(setup, positions):
        output = setup.model.generate(**batch, **{**fixed, **options})
    return output[:, batch["input_ids"].shape[1] :].tolist()


@torch.no_grad()
def write_anew(setup, row, positions="answer"):
    """The same, the whole sequence anew for each token, without cache, batch and padding."""
    layers = setup.layers
    kept = []
    handles = [layers[s].register_forward_hook(lambda m, a, out: kept.append(out)) for s in setup.source_layers]
    setup.model(input_ids=torch.tensor([row]), use_cache=False)
    for handle in handles:
        handle.remove()
    states = [(out[0] if isinstance(out, tuple) else out)[0, -1] for out in kept]
    z, ids = sum(states) / len(states), list(row)
    for _ in range(NEW):
        first = len(row) - (positions == "predicting")
        places = dict.fromkeys(range(first, len(ids)), 0)
        logits = reference.echo_logits(setup.model, setup.sites, setup.networks.networks, ids, [z], places, site_key)
        last = logits[-1].clone()
        last[1] = -torch.inf  # the end token: `min_new_tokens`
        ids.append(int(last.argmax()))
    return ids[len(row) :]


@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_equals_recomputation(family, batch):
    setup = echoing(family)
    rows = prompts(batch)
    expected = [write_anew(setup, row) for row in rows]
    assert write(setup, rows) == expected
    assert write(setup, rows, use_cache=False) == expected
    assert [write(setup, [row])[0] for row in rows[:4]] == expected[:4]


def test_the_echo_changes_what_is_written():
    """Otherwise the test above could pass without one."""
    setup, rows = echoing("llama"), prompts(8)
    plain = setup.model.generate(
        **padded(rows), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0
    )
    found = write(setup, rows)
    assert sum(a != b for a, b in zip(found, plain[:, -NEW:].tolist(), strict=True)) >= 6
    again = setup.model.generate(
        **padded(rows), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0
    )
    assert torch.equal(again, plain), "hooks were left behind"


@pytest.mark.parametrize("form", [{"gate": "none"}, {"aggregation": "mean", "sources": [3, 4], "targets": [0, 1]}])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_at_the_last_prompt_token_too(family, form):
    setup, rows = echoing(family, **form), prompts(5, seed=3)
    expected = [write_anew(setup, row, "predicting") for row in rows]
    assert write(setup, rows, "predicting") == expected
    assert write(setup, rows, "predicting", use_cache=False) == expected
    assert expected != write(setup, rows)


def test_several_answers_and_beams():
    """Rows that `generate` repeats keep the echo of their prompt."""
    setup, rows = echoing("llama"), prompts(3, seed=1)
    torch.manual_seed(0)
    several = write(setup, rows, do_sample=True, temperature=1e-4, num_return_sequences=3)
    assert several == [answer for answer in write(setup, rows) for _ in range(3)]
    one_by_one = [write(setup, [row], num_beams=4)[0] for row in rows]
    assert write(setup, rows, num_beams=4) == one_by_one


def test_padding_on_the_right_is_refused():
    setup = echoing("llama")
    batch = {"input_ids": torch.tensor([[3, 4, 5], [3, 4, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    with torch.no_grad(), writing_with_echo(setup, "answer"), pytest.raises(ValueError, match="padding_side='left'"):
        setup.model.generate(**batch, max_new_tokens=2)
