"""Beams, rewards, advantages and loss against a reference written with loops, in float64."""

import beam_reference
import pytest
import torch
from beam_cases import G, beam_trainer, even_length, prompt_rows, tiny_base
from models import adapted, tiny_model, tiny_tokenizer

BETA = 0.3
LONGEST = 6


def whole_rows(batches, pad):
    """Rows of micro-batches without padding: of each (prompt, completion), and its figures per token."""
    found = {}
    for batch in batches:
        for i in range(len(batch["prompt_ids"])):
            prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist()
            mask = batch["completion_mask"][i].bool()
            found[tuple(prompt), tuple(batch["completion_ids"][i][mask].tolist())] = {
                "advantage": batch["advantages"][i].item(),
                "old": batch["old_per_token_logps"][i][mask],
                "reference": batch["ref_per_token_logps"][i][mask],
            }
    return found


ENDS = [1, *range(8, 60, 9)]
"""Tokens that end a completion: several, so that beams of a random model are unequal in length."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    model = tiny_model(dtype=torch.float64)
    model.generation_config.eos_token_id = ENDS
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=["lora", "whole model"])
def trained(request, base, tmp_path_factory):
    """A trainer after one step of two micro-batches, each with two prompts or parts of them, in float64."""
    lora = request.param == "lora"
    trainer = beam_trainer(
        tmp_path_factory.mktemp("out"),
        model=base,
        lora=lora,
        model_init_kwargs={"dtype": "auto"},
        max_steps=1,
        beta=BETA,
        max_completion_length=LONGEST,
        beam_reward="reverse_rank",
        beam_decay=5.0,
        gradient_checkpointing=False,
    )
    trainer.start = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    return trainer


def at_the_start(trainer):
    """The model as it was when the beams were made."""
    model = trainer.model
    now = {name: value.detach().clone() for name, value in model.named_parameters()}
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(trainer.start[name])
    return now


def expected_rows(trainer):
    """(prompt, completion) of every row that the first step should have, with its advantage."""
    tokenizer, rows = tiny_tokenizer(), {}
    for row in prompt_rows():
        prompt = tokenizer(row["prompt"])["input_ids"]
        beams = beam_reference.beam_search(trainer.model, prompt, G, LONGEST, set(ENDS))
        texts = tokenizer.batch_decode([list(tokens) for tokens, _ in beams], skip_special_tokens=True)
        rights = [even_length(row["prompt"], text, row) for text in texts]
        rewards = beam_reference.group("reverse_rank", rights, decay=5.0)
        for (tokens, _), advantage in zip(beams, beam_reference.advantages(rewards), strict=True):
            rows[tuple(prompt), tokens] = advantage
    return rows


def test_a_step_is_that_of_the_loops(trained):
    batches = trained.generated
    found = whole_rows(batches, 0)
    now = at_the_start(trained)
    trained.model.eval()
    expected = expected_rows(trained)
    assert len(found) == 4 * G  # four prompts of a generation, each with G different beams
    assert {len(completion) for _, completion in found} >= {LONGEST} and len({len(c) for _, c in found}) > 1
    assert set(found) <= set(expected)
    for row, figures in found.items():
        assert figures["advantage"] == pytest.approx(expected[row], abs=1e-6)  # rewards are float32 in TRL
        old = beam_reference.token_log_probabilities(trained.model, *row)
        for kind in ("old", "reference"):  # TRL's head gives log-probabilities in float32, whatever the model is
            torch.testing.assert_close(figures[kind].double(), torch.stack(old).detach(), rtol=0, atol=2e-6)
    assert {len(batch["prompt_ids"]) for batch in batches} == {2 * G}
    groups = [len({tuple(prompt.tolist()) for prompt in batch["prompt_ids"]}) for batch in batches]
    assert max(groups) > 2  # shuffled: a micro-batch holds parts of groups, and the advantages are those of whole ones

    with torch.no_grad():  # the trained model: ratios are not one, some are clipped
        for name, value in trained.model.named_parameters():
            value.copy_(now[name])
    trained.model.train()
    ratios = []
    for batch in batches:
        rows = whole_rows([batch], 0)
        trained.model.zero_grad()
        loss = trained.compute_loss(trained.model, batch) * trained.args.gradient_accumulation_steps
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in trained.model.named_parameters() if p.grad is not None}
        trained.model.zero_grad()
        new = {row: beam_reference.token_log_probabilities(trained.model, *row) for row in rows}
        ratios += [(b - a).exp().item() for row in rows for a, b in zip(rows[row]["old"], new[row], strict=True)]
        parts = [(expected[row], new[row], *figures_of(rows[row])) for row in rows]
        reference = beam_reference.loss(parts, BETA)
        reference.backward()
        assert loss.item() == pytest.approx(reference.item(), rel=1e-6, abs=2e-7)
        assert max(gradient.abs().max() for gradient in gradients.values()) > 0.1
        for name, parameter in trained.model.named_parameters():
            if name in gradients:
                torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=2e-6)

    assert min(ratios) < 0.8 and max(ratios) > 1.2  # both sides of the clipping


def figures_of(row):
    return row["old"].tolist(), row["reference"].tolist()


@pytest.mark.parametrize(("width", "longest"), [(1, 5), (2, 4), (4, 7), (7, 3)])
def test_the_loops_find_the_beams_of_transformers(base, width, longest):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).eval()
    for row in prompt_rows(4):
        prompt = tiny_tokenizer()(row["prompt"])["input_ids"]
        search = {"length_penalty": 0.0, "early_stopping": "never"} if width > 1 else {}
        out = model.generate(
            input_ids=torch.tensor([prompt]),
            max_new_tokens=longest,
            num_beams=width,
            num_return_sequences=width,
            do_sample=False,
            **search,
        )[:, len(prompt) :].tolist()
        beams = beam_reference.beam_search(model, prompt, width, longest, set(ENDS))
        assert [up_to_the_end(tokens) for tokens in out] == [list(tokens) for tokens, _ in beams]


def up_to_the_end(tokens):
    return next((tokens[: i + 1] for i, token in enumerate(tokens) if token in ENDS), tokens)


def test_the_trainer_generates_what_generate_does(tmp_path):
    """With an adapter, dropout in it, and prompts of unequal lengths in one batch: beams of the model that is used."""
    model = adapted(tiny_model(dtype=torch.float64), lora_dropout=0.5)
    trainer = beam_trainer(tmp_path, model=model, lora=False, num_generations=4, per_device_train_batch_size=4)
    rows = prompt_rows(5)
    prompts = [tiny_tokenizer()(row["prompt"])["input_ids"] for row in rows]
    trainer.model.train()
    generated, _ = trainer._generate_single_turn([p for p in prompts for _ in range(4)], None, {}, 4)
    assert trainer.model.training
    trainer.model.eval()
    for i, prompt in enumerate(prompts):
        beams = beam_reference.beam_search(trainer.model, prompt, 4, 4, {1})
        assert [tuple(tokens) for tokens in generated[4 * i : 4 * i + 4]] == [tokens for tokens, _ in beams]
        totals = [total for _, total in beams]
        assert totals == sorted(totals, reverse=True)


def test_mixed_rows_are_refused(tmp_path):
    trainer = beam_trainer(tmp_path)
    with pytest.raises(RuntimeError, match="whole groups of 3"):
        trainer._generate_single_turn([[5], [5], [6]], None, {}, 3)


def test_the_base_of_the_reference_is_loaded_again(tmp_path):
    """Full parameters: KL against the model as it lies on the disk, not as it is trained."""
    trainer = beam_trainer(tmp_path / "out", model=tiny_base(tmp_path / "base"), lora=False, max_steps=2)
    trainer.train()
    frozen = dict(trainer.ref_model.named_parameters())
    moved = [name for name, value in trainer.model.named_parameters() if not torch.equal(value, frozen[name])]
    assert len(moved) == len(frozen)
