"""Two models on the same items: the command says the paired difference; tables are read as training reads them."""

import csv
import json

import pytest
from models import adapted, tiny_model, tiny_tokenizer

from echo_trainer import cli, evaluate_adapter
from echo_trainer.evaluation.beside import _paired


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base, an adapter, and the same rows as JSON Lines and as tables."""
    folder = tmp_path_factory.mktemp("place")
    tiny_model().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    adapted(tiny_model()).save_pretrained(folder / "adapter")
    rows = [(f"w{n} w{n + 1}" + " w3" * (n % 5), f"w{n % 7} w2") for n in range(12)]
    lines = [json.dumps({"prompt": q, "completion": f" {a}"}) for q, a in rows]
    (folder / "mine.jsonl").write_text("\n".join(lines))
    for name, separator in (("table.csv", ","), ("table.tsv", "\t")):
        with (folder / name).open("w", newline="") as file:
            csv.writer(file, delimiter=separator).writerows([("question", "answer"), *rows])
    return folder


def evaluate(place, tmp_path, tasks="mine.jsonl", **options):
    options = {"base": str(place / "base"), "mode": "nll", "device": "cpu", **options}
    return evaluate_adapter(place / "adapter", str(place / tasks), output=tmp_path / "records", **options)


def test_difference_to_the_base_is_that_of_two_evaluations(place, tmp_path):
    found = evaluate(place, tmp_path, against="base")
    alone = evaluate_adapter(
        place / "base", str(place / "mine.jsonl"), output=tmp_path / "b", mode="nll", device="cpu"
    )
    row = next(row for row in found["differences"] if row["metric"] == "nll")
    assert row["this"] == pytest.approx(found["results"][0]["value"])
    assert row["against"] == pytest.approx(alone["results"][0]["value"])
    assert row["difference"] == pytest.approx(row["this"] - row["against"]) and row["difference"] != 0
    assert row["interval"][0] < row["difference"] < row["interval"][1] and row["n"] == 12


def test_another_adapter_and_what_cannot_be_compared(place, tmp_path):
    found = evaluate(place, tmp_path, against=place / "base")
    assert {row["task"] for row in found["differences"]} == {"mine"}
    with pytest.raises(ValueError, match="compared with itself"):
        evaluate(place, tmp_path, against=place / "adapter")
    with pytest.raises(ValueError, match="no place for `against`"):
        evaluate(place, tmp_path, against="base", with_echo=True)


@pytest.mark.parametrize("table", ["table.csv", "table.tsv"])
def test_tables_give_the_figures_of_json_lines(place, tmp_path, table):
    """The answer follows the question after one space, as in a run with the same two columns."""
    named = evaluate(place, tmp_path / "a", table, columns=("question", "answer"))
    lines = evaluate(place, tmp_path / "b")
    assert named["results"][0]["value"] == lines["results"][0]["value"]
    with pytest.raises(ValueError, match="no column 'query'"):
        evaluate(place, tmp_path / "c", table, columns=("query", "answer"))


def test_the_command_shows_units_answers_and_the_difference(place, tmp_path, capsys):
    words = ["evaluate", str(place / "adapter"), "--base", str(place / "base"), "--tasks", str(place / "table.csv")]
    words += ["--prompt_column", "question", "--completion_column", "answer", "--against", "base"]
    for mode in ("nll", "generate"):
        output = ["--mode", mode, "--output", str(tmp_path / mode), "--max_new_tokens", "3"]
        assert cli.main([*words, *output]) == 0
    shown = capsys.readouterr().out
    assert "nll, nats per answer" in shown and "no evidence of a difference" in shown.replace("\n", " ")
    assert "table: the first answers" in shown
    assert cli.main([*words[:8], "--mode", "nll", "--output", str(tmp_path / "x")]) == 2
    assert "Name both columns" in capsys.readouterr().err


def test_a_table_that_is_none(place, tmp_path):
    (tmp_path / "empty.csv").write_text("question,answer\n")
    with pytest.raises(ValueError, match="cannot be read as CSV"):
        evaluate_adapter(place / "adapter", str(tmp_path / "empty.csv"), base=str(place / "base"), output=tmp_path)


@pytest.mark.parametrize(
    ("pairs", "known"),
    [([(1.0, 1.0)] * 10, False), ([(0.0, 0.0)] * 3, False), ([(1.0, 0.0), (1.0, 1.0)], True), ([(1.0, 0.0)], False)],
    ids=["all right", "all wrong", "one differs", "one item"],
)
def test_items_that_all_agree_give_no_interval(pairs, known):
    """Ten wrong answers on both sides do not say that no answer would differ."""
    assert (_paired(pairs, ("this", "against"))["interval"] is not None) == known
