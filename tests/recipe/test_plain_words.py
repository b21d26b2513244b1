"""What stopped a new user, each said in words before it costs time: empty answers, slips, silent runs."""

import json
import logging
import warnings

import pytest
from models import prompt_completion_rows, tiny_model, tiny_tokenizer
from rich.console import Console

from echo_trainer import cli
from echo_trainer.cli.ablate import _Bar
from echo_trainer.recipe.arguments import parse
from echo_trainer.recipe.data import load_data
from echo_trainer.recipe.training import warn_of_silence

USER, EMPTY = {"role": "user", "content": "w1"}, {"role": "assistant", "content": " "}
GOOD = {"role": "assistant", "content": "w2"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}


def load(tmp_path, rows):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data, _, _, mixture = parse(["--dataset_name", str(tmp_path / "rows.jsonl"), "--output_dir", "out"])
    return load_data(data, mixture)


@pytest.mark.parametrize(
    ("good", "empty"),
    [
        ({"prompt": "w1", "completion": " w2"}, {"prompt": "w1", "completion": ""}),
        ({"prompt": "w1", "completion": " w2"}, {"prompt": "w1", "completion": None}),
        ({"prompt": [USER], "completion": [GOOD]}, {"prompt": [USER], "completion": [EMPTY]}),
        ({"messages": [USER, GOOD]}, {"messages": [USER, EMPTY]}),
        ({"messages": [USER, GOOD]}, {"messages": [USER, EMPTY, USER, GOOD]}),
        ({"conversations": [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]},
         {"conversations": [{"from": "human", "value": "w1"}, {"from": "gpt", "value": ""}]}),
    ],
)  # fmt: skip
def test_empty_answers_are_refused_by_their_rows(tmp_path, good, empty):
    with pytest.raises(ValueError, match=r"2 of 5 rows .* an answer without a word .* \(rows 1, 3, counted from 0\)"):
        load(tmp_path, [good, empty, good, empty, good])
    assert len(load(tmp_path, [good, good])["train"]) == 2


def test_a_turn_that_calls_a_tool_needs_no_words(tmp_path):
    assert len(load(tmp_path, [{"messages": [USER, CALL, {"role": "tool", "content": "3"}, GOOD]}])["train"]) == 1


@pytest.mark.parametrize(("slip", "meant"), [("--learning_rat", "--learning_rate"), ("--echo_p_ends", "--echo_p_end")])
def test_a_slip_on_the_command_line_is_named_with_what_was_meant(slip, meant):
    with pytest.raises(ValueError, match=f"no option '{slip}'.*Did you mean {meant}?"):
        parse([slip, "1", "--output_dir", "out"])
    with pytest.raises(ValueError, match="lists the options"):
        parse(["--zzzzzzzz", "1", "--output_dir", "out"])


@pytest.mark.parametrize(("steps", "every", "said"), [(6, 10, 1), (10, 10, 0), (6, 1, 0), (-1, 10, 0)])
def test_a_run_that_would_log_nothing_is_said(tmp_path, caplog, steps, every, said):
    _, config, *_ = parse(["--max_steps", str(steps), "--logging_steps", str(every), "--output_dir", str(tmp_path)])
    with caplog.at_level(logging.WARNING):
        warn_of_silence(config)
    assert len([r for r in caplog.records if "no loss is logged" in r.message]) == said


def test_a_choice_of_layers_that_few_samples_do_not_support_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("base")
    tiny_tokenizer().save_pretrained("base")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, prompt_completion_rows(12))))
    words = ["--model_name_or_path", "base", "--dataset_name", "rows.jsonl", "--output_dir", "out"]
    assert cli.main(["select-layers", *words, "--n_samples", "4", "--n_bootstrap", "20", "--ratio", "0.6"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    stability = json.loads((tmp_path / "out" / "layer_selection.json").read_text())
    unsure = [layer for layer in stability["layers"] if stability["stability"][layer] < 0.9]
    assert ("do not decide the choice" in shown) is bool(unsure) and unsure


def test_an_ablation_says_how_far_it_is_where_there_is_no_terminal(capsys):
    with _Bar(Console(force_terminal=False)) as bar:
        bar.start(2)
        bar.update("lora/seed-0", "training", 0, 4)
        bar.finish("lora/seed-0", "done")
    shown = capsys.readouterr().out
    assert "2 runs" in shown and "lora/seed-0: done; 1 of 2 after" in shown


def test_what_a_user_can_do_nothing_about_is_not_said(capsys):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert cli.main(["recipes"]) == 0
        warnings.warn("`gradient_checkpointing` is deprecated and will be removed in v6.", FutureWarning)
        warnings.warn("something else", FutureWarning)
    assert [str(warning.message) for warning in caught] == ["something else"]
