"""
What CONTRIBUTING.md promises to who adds an aggregation, an echo pass or an engine: a line of a table, and it is known
everywhere, to options, help, training, log, record, card, `check` and the notes where memory ends.
"""

import importlib.util
import json
import logging
from dataclasses import fields

import adapter_cases as make
import pytest
import torch
from models import adapted, tiny_model
from paths import ROOT
from row_by_row import ROW_BY_ROW
from steps import assert_same_gradients, echo_setup, padded_collator, random_examples, step_gradients
from training import adapter, echo_trainer, losses

from echo_trainer import EchoSFTConfig, check_adapter
from echo_trainer import fields as echo_fields
from echo_trainer.adapter.engines import ENGINES, Engine
from echo_trainer.cli import main
from echo_trainer.method.aggregation import AGGREGATIONS, Aggregation
from echo_trainer.method.costs import echo_cost
from echo_trainer.method.plan import make_plan
from echo_trainer.method.segments import find_segments
from echo_trainer.passes.echo import FORMS
from echo_trainer.passes.full import ROWS
from echo_trainer.passes.memory import explain_out_of_memory
from echo_trainer.passes.shape import model_shape
from echo_trainer.report.render import render_card


def declared(name):
    """A field of the options as a fresh start of the package declares it."""
    spec = importlib.util.spec_from_file_location("echo_trainer.fields_again", echo_fields.__file__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    return next(item.metadata for item in fields(again.EchoFields) if item.name == name)


def trained(folder, **settings):
    """A run, its record and its card."""
    trainer = echo_trainer(folder, max_steps=3, echo_p_end=1.0, **settings)
    trainer.train()
    trainer.save_model()
    record = json.loads((folder / "echo_run.json").read_text())
    return trainer, record, (folder / "README.md").read_text()


# An aggregation


def by_norm(states_SGd, learned):
    """A mean in which layers count by the norm of their states, to a learned power."""
    weight_SG = (states_SGd.norm(dim=-1) ** learned).softmax(dim=0)
    return (weight_SG[..., None] * states_SGd).sum(dim=0)


@pytest.fixture
def norm(monkeypatch):
    added = Aggregation("a mean by norm", by_norm, start=lambda n_sources, hidden_size: torch.ones(n_sources, 1) / 2)
    monkeypatch.setitem(AGGREGATIONS, "norm", added)


def test_an_aggregation(norm, tmp_path):
    assert "norm" in declared("echo_aggregation")["choices"]
    assert "'norm' (a mean by norm)" in declared("echo_aggregation")["help"]
    with pytest.raises(ValueError, match="'mean', 'weighted', 'norm'"):
        EchoSFTConfig(output_dir=str(tmp_path / "wrong"), echo_aggregation="max")
    settings = {"echo_source_layers": [3, 4], "echo_target_layers": [0, 1], "echo_scale": 1.0}
    trainer, record, card = trained(tmp_path / "norm", echo_aggregation="norm", **settings)
    learned = trainer.echo_networks.source_logits
    assert learned.shape == (2, 1) and not torch.equal(learned, torch.ones(2, 1) / 2)
    assert record["echo"]["echo_aggregation"] == "norm"
    assert "| aggregation, bottleneck, positions | norm, 64, answer |" in card
    plain, *_ = trained(tmp_path / "mean", **settings)
    assert losses(trainer)[0] == losses(plain)[0] and losses(trainer) != losses(plain)


# An echo pass


@pytest.fixture
def row_by_row(monkeypatch):
    monkeypatch.setitem(FORMS, ROW_BY_ROW.name, ROW_BY_ROW)


def test_an_echo_pass(row_by_row, tmp_path, caplog):
    assert "single" in declared("echo_pass")["choices"]
    assert "'single' (one row after the other)" in declared("echo_pass")["help"]
    with pytest.raises(ValueError, match="'auto', 'suffix', 'full', 'single'"):
        EchoSFTConfig(output_dir=str(tmp_path / "wrong"), echo_pass="half")
    with caplog.at_level(logging.INFO):
        single, record, card = trained(tmp_path / "single", echo_pass="single", echo_held_out=8, echo_probation=2)
    assert "Echo pass: row by row." in caplog.text
    assert record["echo"]["pass"] == "row by row" and "| echo pass | row by row |" in card
    full, *_ = trained(tmp_path / "full", echo_pass="full", echo_held_out=8, echo_probation=2)
    torch.testing.assert_close(losses(single), losses(full), rtol=1e-4, atol=0)
    for name, tensor in adapter(full).items():
        torch.testing.assert_close(adapter(single)[name], tensor, rtol=1e-2, atol=1e-5)


def test_an_echo_pass_has_a_cost_and_gradients(row_by_row):
    examples = random_examples(4, turns=2)
    batch = padded_collator()(examples)
    segments = find_segments(batch)
    model = adapted(tiny_model(dtype=torch.float64)).train()
    setup = echo_setup(model)
    single, full = (make_plan(segments, [True, False, True, True], form=form) for form in (ROW_BY_ROW, ROWS))
    costs = [echo_cost(plan.layout, segments, model_shape(setup, False)) for plan in (single, full)]
    assert costs[0].flops == costs[1].flops and costs[0].overhead == 3 * costs[1].overhead
    batch.pop("labels")
    (_, found), (_, expected) = (step_gradients(model, setup, batch, plan) for plan in (single, full))
    assert_same_gradients(found, expected, rtol=1e-9)
    with pytest.raises(MemoryError) as raised, explain_out_of_memory(batch, single, "echo pass"):
        raise MemoryError
    (note,) = raised.value.__notes__
    assert "which runs 3 rows again, one after the other" in note and "- a smaller max_length" in note


# An engine


@pytest.fixture
def lmdeploy(monkeypatch):
    """Above the others, so that it would show if their signs went by that order."""
    added = Engine(
        title="LMDeploy",
        page="https://lmdeploy.readthedocs.io",
        flags="--backend pytorch",
        command="lmdeploy serve api_server {base} {flags} --adapters {name}={adapter}",
        port=23333,
    )
    others = dict(ENGINES)
    monkeypatch.setitem(ENGINES, "lmdeploy", added)
    for name in others:
        ENGINES[name] = ENGINES.pop(name)


def test_an_engine(lmdeploy, tmp_path, capsys):
    good, dora = tmp_path / "good", tmp_path / "dora"
    base = make.save_base("llama", tmp_path / "base")
    make.save_adapter(base, good)
    make.save_adapter(base, dora, use_dora=True)
    assert main(["check", str(good), "--engine", "lmdeploy", "--base", str(base)]) == 0
    assert "LMDeploy: --backend pytorch." in capsys.readouterr().out
    # What no sign says is not known, and not taken for good.
    assert main(["check", str(dora), "--engine", "lmdeploy", "--base", str(base)]) == 3
    report = check_adapter(dora, base=base)
    assert report.verdicts["lmdeploy"] == "unknown"
    signs = [report.verdicts[name] for name in ("vllm", "tgi", "lorax", "sglang", "llama.cpp")]
    assert signs == ["refuses", "silently-wrong", "silently-wrong", "refuses", "refuses"]
    with pytest.raises(SystemExit):
        main(["check", "--help"])
    assert "{lmdeploy,vllm,tgi," in capsys.readouterr().out
    card = render_card(json.loads((ROOT / "model_cards" / "example" / "echo_run.json").read_text()))
    assert 'lmdeploy serve api_server "$BASE" --backend pytorch --adapters echo-adapter=.' in card
    assert "Each answers under the adapter's name (LMDeploy on port 23333, vLLM on 8000, SGLang on 30000):" in card
