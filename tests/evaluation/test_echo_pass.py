"""`evaluate --with-echo`: the echo pass of a checkpoint, scored and written, beside the plain path."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import reference
import torch
from datasets import Dataset
from models import lora_config, prompt_completion_rows, tiny_model, tiny_tokenizer
from safetensors.torch import load_file
from training import echo_trainer, revive

from echo_trainer import cli
from echo_trainer.evaluation.adapter import evaluate_adapter
from echo_trainer.evaluation.echo import EchoReader, echo_checkpoint, load_echo
from echo_trainer.evaluation.model import load_for_evaluation
from echo_trainer.evaluation.scoring import TokenizedRow, score_rows, tokenize_row
from echo_trainer.method.sites import site_key

ROWS = prompt_completion_rows(9, seed=5)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, a run on it with a checkpoint whose echo is alive, and rows of text."""
    folder = tmp_path_factory.mktemp("run")
    tiny_model().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    trainer = echo_trainer(
        folder / "run", model=str(folder / "base"), max_steps=2, save_strategy="steps", save_steps=1,
        echo_preset="strong", echo_gate="sigmoid", echo_source_layers=[3, 4], echo_target_layers=[0, 2],
        lora=lora_config(init_lora_weights=True), echo_learning_rate=0.3,
        trainer_kwargs={"eval_dataset": Dataset.from_list(ROWS)},
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    (folder / "mine.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    return folder, trainer


def loaded_echo(place):
    folder, _ = place
    loaded = load_for_evaluation(str(folder / "run" / "checkpoint-2"))
    return loaded, load_echo(loaded.model, loaded.tokenizer, folder / "run" / "checkpoint-2")[0]


def expected_score(reader, ids, start, scored=None, of=None):
    """Log-likelihood of tokens, with loops; `of`: the prompt whose echo they get, None for their own."""
    setup = reader.setup
    labels = [-100] * start + [
        t if s else -100 for t, s in zip(ids[start:], scored or [True] * len(ids), strict=False)
    ]
    _, states = reference.logits_and_states(setup.model, ids)
    echoes, places = [], {}
    for number, (first, last) in enumerate(reference.spans(labels)):
        boundary = first - 1
        if of is not None:
            boundary, states = len(of) - 1, reference.logits_and_states(setup.model, of)[1]
        echoes.append(sum(states[s][boundary] for s in setup.source_layers) / len(setup.source_layers))
        places |= dict.fromkeys(range(first, last + 1), number)
    logits = reference.echo_logits(setup.model, setup.sites, setup.networks.networks, ids, echoes, places, site_key)
    return -float(reference.cross_entropy(logits, labels))


@torch.no_grad()
def test_scores_equal_reference(place):
    loaded, reader = loaded_echo(place)
    prompts, options = ["w1 w2 w3", "w9", "w4 w5 w6 w7 w8"], [" w1", " w2 w3", " w2 w4 w5"]
    rows = [tokenize_row(loaded.tokenizer, prompt, options) for prompt in prompts]
    together = reader.score(rows)
    for row, scores in zip(rows, together, strict=True):
        for ids, score in zip(row.sequences, scores, strict=True):
            assert score.log_likelihood == pytest.approx(expected_score(reader, ids, row.start), rel=1e-4)
            assert score.n_tokens == len(ids) - row.start
    alone = [reader.score([row])[0] for row in rows]
    for one, other in zip(together, alone, strict=True):
        assert [s.log_likelihood for s in one] == pytest.approx([s.log_likelihood for s in other], rel=1e-5)
    turns = TokenizedRow([[3, 9, 10, 4, 11, 12, 13]], 1, 7, (True, True, False, False, True, True))
    expected = expected_score(reader, turns.sequences[0], 1, turns.scored)
    assert reader.score([turns])[0][0].log_likelihood == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_scores_with_the_echo_of_another_equal_reference(place):
    """The next prompt's for every option of a prompt; alone the one before, and the first alone none."""
    folder, _ = place
    loaded, own = loaded_echo(place)
    reader, _ = load_echo(loaded.model, loaded.tokenizer, folder / "run" / "checkpoint-2", borrowed=True)
    prompts, options = ["w1 w2 w3", "w9", "w4 w5 w6 w7 w8"], [" w1", " w2 w3"]
    rows = [tokenize_row(loaded.tokenizer, prompt, options) for prompt in prompts]
    texts = [row.sequences[0][: row.start] for row in rows]

    def check(rows, others):
        for row, scores, of in zip(rows, reader.score(rows), others, strict=True):
            for ids, score in zip(row.sequences, scores, strict=True):
                assert score.log_likelihood == pytest.approx(expected_score(reader, ids, row.start, of=of), rel=1e-4)
                mine = expected_score(own, ids, row.start)
                assert (abs(score.log_likelihood - mine) > 1e-3) == (score.n_tokens > 1)  # the first is not reached

    check(rows, [texts[1], texts[2], texts[0]])
    check(rows[:1], [texts[2]])
    turns = TokenizedRow([[3, 9, 10, 4, 11, 12, 13]], 1, 7, (True, True, False, False, True, True))
    together = reader.score([turns, rows[0]])
    assert together[0][0].log_likelihood == pytest.approx(
        expected_score(reader, turns.sequences[0], 1, turns.scored, of=texts[0]), rel=1e-4
    )
    fresh, _ = load_echo(loaded.model, loaded.tokenizer, folder / "run" / "checkpoint-2", borrowed=True)
    plain = score_rows(loaded.model, loaded.tokenizer, rows[:1])
    assert [s.log_likelihood for s in fresh.score(rows[:1])[0]] == pytest.approx(
        [s.log_likelihood for s in plain[0]], rel=1e-5
    )


def echoes_given(reader, run):
    """Normalised echoes (G, d) that the networks were given in `run`."""
    found, network = [], next(iter(reader.setup.networks.networks.values()))
    handle = network.register_forward_hook(lambda module, args, output: found.append(args[0]))
    run()
    handle.remove()
    return torch.cat(found)


@pytest.mark.parametrize("beams", [1, 2, 3])
def test_beams_and_prompts_that_recur_do_not_trade_with_each_other(place, beams):
    """Each gets the echo of another prompt; one that stands twice in a batch has none to give to itself."""
    folder, _ = place
    loaded, own = loaded_echo(place)
    other, _ = load_echo(loaded.model, loaded.tokenizer, folder / "run" / "checkpoint-2", borrowed=True)
    prompts = ["w1 w2 w3", "w4 w5 w6", "w4 w5 w6", "w7 w8 w9"]
    options = {"max_new_tokens": 2, "num_beams": beams}
    mine, given = (echoes_given(reader, lambda r=reader: r.answers(prompts, **options)) for reader in (own, other))
    expected = mine.unflatten(0, (4, beams))[[1, 3, 3, 0]].flatten(0, 1)
    torch.testing.assert_close(given, expected)
    rows = [tokenize_row(loaded.tokenizer, prompt, [" w1 w2", " w3 w4 w5"]) for prompt in prompts]
    mine, given = (echoes_given(reader, lambda r=reader: r.score(rows)) for reader in (own, other))
    torch.testing.assert_close(given, mine.unflatten(0, (4, 2))[[1, 3, 3, 0]].flatten(0, 1))


def test_a_prompt_that_recurs_one_at_a_time_is_not_given_its_own(place):
    """Batches of one, in which the echo of the batch before may be of the same prompt, whatever its padding was."""
    folder, _ = place
    loaded, own = loaded_echo(place)
    prompts = ["w1 w2", "w4 w5 w6", "w4 w5 w6", "w7 w8 w9 w1"]

    def written(reader):
        for batch in (prompts[:2], prompts[2:3], prompts[3:]):
            reader.answers(batch, max_new_tokens=2)

    def scored(reader):
        for prompt in prompts:
            reader.score([tokenize_row(loaded.tokenizer, prompt, [" w1 w2"])])

    for run, expected in ((written, [1, 0, 0, 2]), (scored, [None, 0, 0, 2])):
        other, _ = load_echo(loaded.model, loaded.tokenizer, folder / "run" / "checkpoint-2", borrowed=True)
        mine, given = (echoes_given(reader, partial(run, reader)) for reader in (own, other))
        for of, z in zip(expected, given, strict=True):
            torch.testing.assert_close(z, torch.zeros_like(z) if of is None else mine[of])


def test_the_figures_are_those_of_the_trainer(place):
    """NLL of both passes in sum = what `evaluate` says about the same rows per token."""
    folder, trainer = place
    found = evaluate_adapter(folder / "run", str(folder / "mine.jsonl"), mode="nll", with_echo=True)
    said, tokens = trainer.evaluate(), sum(len(row["completion"].split()) + 1 for row in ROWS)
    nll = next(row for row in found["differences"] if row["metric"] == "nll")
    assert nll["n"] == 9 and nll["difference"] == pytest.approx(nll["echo"] - nll["plain"])
    assert -nll["difference"] * 9 / tokens == pytest.approx(said["eval_echo_advantage"], rel=1e-4)
    assert nll["echo"] * 9 / tokens == pytest.approx(said["eval_echo_loss"], rel=1e-4)
    assert found["results"][0]["value"] == pytest.approx(nll["plain"])
    assert found["echo"]["results"][0]["value"] == pytest.approx(nll["echo"])
    own = next(row for row in found["differences"] if "other" in row and row["metric"] == "nll")
    assert own["echo"] == nll["echo"] and own["other"] == pytest.approx(found["other"]["results"][0]["value"])
    assert abs(own["difference"]) > 1e-4 and own["n"] == 9


@pytest.mark.parametrize("mode", ["generate", "nll"])
def test_the_command(place, mode, tmp_path, monkeypatch, capsys):
    folder, _ = place
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "run", "run")
    before = {path: path.read_bytes() for path in Path("run/checkpoint-2").rglob("*") if path.is_file()}
    words = ["evaluate", "--with-echo", "run", "--tasks", str(folder / "mine.jsonl"), "--mode", mode]
    assert cli.main([*words, "--max_new_tokens", "4"]) == 0
    shown = capsys.readouterr().out
    assert "the echo pass (training only) beside the plain path" in shown and "checkpoint-2" in shown
    assert "beside the same with the echo of another item" in shown.replace("\n", " ")
    where = Path("run/evaluation/checkpoint-2")
    plain, echo = (json.loads((where / f"results.{name}.json").read_text()) for name in (mode, f"{mode}-echo"))
    assert plain["model"].items() < echo["model"].items() and "echo_networks" in echo["model"]
    other = json.loads((where / f"results.{mode}-other-echo.json").read_text())
    assert other["model"].items() > echo["model"].items() and other["results"][0]["n"] == 9
    lines = (where / f"mine.{mode}-echo.jsonl").read_text()
    assert len(lines.splitlines()) == 10
    assert cli.main([*words, "--max_new_tokens", "4"]) == 0  # goes on where it is: nothing is left to do
    assert (where / f"mine.{mode}-echo.jsonl").read_text() == lines
    assert {path: path.read_bytes() for path in before} == before
    assert (
        "evaluation" not in json.loads(Path("run/echo_run.json").read_text())
        or not json.loads(Path("run/echo_run.json").read_text())["evaluation"]
    ), "the figures of the echo pass are not the adapter's"


def test_answers_are_written_with_the_echo(place):
    _, reader = loaded_echo(place)
    prompts = [row["prompt"] for row in ROWS]
    revive_scale(reader)
    found = reader.answers(prompts, max_new_tokens=5, batch_size=4)
    one = [reader.answers([prompt], max_new_tokens=5)[0] for prompt in prompts]
    assert found == one
    assert found != EchoReader.answers(without_echo(reader), prompts, max_new_tokens=5)


def revive_scale(reader, factor=30.0):
    for name, parameter in reader.setup.networks.named_parameters():
        if name.endswith("scale"):
            parameter.data.mul_(factor)


def without_echo(reader):
    for name, parameter in reader.setup.networks.named_parameters():
        if name.endswith("project_out"):
            parameter.data.zero_()
    return reader


def test_the_last_whole_checkpoint_is_taken(place, tmp_path):
    folder, _ = place
    shutil.copytree(folder / "run", tmp_path / "run")
    assert echo_checkpoint(str(tmp_path / "run")).name == "checkpoint-2"
    path = tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    assert echo_checkpoint(str(tmp_path / "run")).name == "checkpoint-1"
    assert echo_checkpoint(str(tmp_path / "run" / "checkpoint-1")).name == "checkpoint-1"


def test_no_echo_to_evaluate(place, tmp_path, capsys):
    folder, _ = place
    for name, message in ((folder / "base", "it has none"), (tmp_path / "nowhere", "it has none")):
        with pytest.raises(ValueError, match=message):
            echo_checkpoint(str(name))
    shutil.copytree(folder / "run" / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    (tmp_path / "run" / "checkpoint-2" / "echo_networks.safetensors").unlink()
    assert cli.main(["evaluate", "--with-echo", str(tmp_path / "run"), "--tasks", str(folder / "mine.jsonl")]) == 2
    assert "save_strategy='steps'" in capsys.readouterr().err.replace("\n", " ")


def test_networks_of_another_adapter_are_refused(place):
    folder, _ = place
    other = echo_trainer(
        folder / "other", model=str(folder / "base"), max_steps=1, save_strategy="steps", save_steps=1
    )
    revive(other)
    other.train()
    loaded = load_for_evaluation(str(folder / "run" / "checkpoint-2"))
    networks, _ = load_echo(loaded.model, loaded.tokenizer, folder / "other" / "checkpoint-1")
    assert networks.setup.source_layers == [4]  # another echo of the same modules is one that fits
    few = lora_config(target_modules=["q_proj"], init_lora_weights=True)
    third = echo_trainer(folder / "third", model=str(folder / "base"), lora=few, max_steps=1, save_steps=1,
                         save_strategy="steps")  # fmt: skip
    third.train()
    with pytest.raises(ValueError, match="not of one run"):
        load_echo(loaded.model, loaded.tokenizer, folder / "third" / "checkpoint-1")
    assert load_file(folder / "third" / "checkpoint-1" / "echo_networks.safetensors")
