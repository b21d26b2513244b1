"""The benchmark runs every variant on a tiny model and reports what it promises."""

import json

import pytest

from echo_trainer import cli
from echo_trainer.bench import compare
from echo_trainer.bench.compare import check_pass, run_bench
from echo_trainer.bench.lengths import lengths_of
from echo_trainer.bench.step import BASELINE, VARIANTS, BenchOptions
from echo_trainer.cli.bench import small_shape
from echo_trainer.compat.cache import PrefixCache
from echo_trainer.method import grouping

pytestmark = pytest.mark.slow


def test_bench(tmp_path, capsys):
    arguments = "bench --shape tiny --prompt 24 --answer 8 --batch 2 --rounds 2 --warmup 0 --no_memory --output"
    assert cli.main([*arguments.split(), str(tmp_path / "b")]) == 0
    result = json.loads((tmp_path / "b.json").read_text())
    rows = result["variants"]
    assert list(rows) == list(VARIANTS)
    assert rows[BASELINE]["flops_ratio"] == 1
    assert rows["echo off"]["flops"] == rows[BASELINE]["flops"]
    assert rows["suffix, all routed"]["flops"] < rows["full, all routed"]["flops"]
    assert all(len(row["times_s"]) == 2 and row["tokens_per_s"] > 0 for row in rows.values())
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "full, all" in shown and "Read the GFLOP ratios" in " ".join(shown.split())


def test_times_of_a_small_shape_are_not_taken_for_those_of_a_large_one():
    def result(seconds):
        row = {"flops": 1e12, "median_s": seconds}
        return {"variants": {BASELINE: row}, "machine": {"matrix_rate_tflops": 1.0}}

    assert small_shape(result(2.0), BASELINE) is None
    assert "would take 10% of a plain step" in small_shape(result(10.0), BASELINE)


def test_a_row_that_is_not_what_its_name_says_is_an_error(monkeypatch):
    """With the suffix pass gone a benchmark once printed the full pass under its name."""
    with pytest.raises(RuntimeError, match="'suffix, all routed' ran full echo pass"):
        check_pass("suffix, all routed", "full")
    for name, ran in ((BASELINE, "full"), ("echo off", "suffix"), ("full, all routed", None)):
        with pytest.raises(RuntimeError):
            check_pass(name, ran)
    monkeypatch.setattr(PrefixCache, "update", lambda *args, **kwargs: 1 / 0)
    arguments = "bench --shape tiny --prompt 8 --answer 4 --batch 2 --rounds 1 --warmup 0 --no_memory"
    with pytest.raises(ValueError, match="echo_pass='suffix' is not exact"):
        run_bench(BenchOptions(shape="tiny", prompt=8, answer=4, batch=2, rounds=1, warmup=0), measure_memory=False)
    assert cli.main(arguments.split()) == 2


def test_bench_refuses_an_answer_that_the_echo_cannot_reach(capsys):
    assert cli.main(["bench", "--answer", "1"]) == 2
    assert "would reach nothing" in capsys.readouterr().err


def bench(tmp_path, arguments):
    """Rows of a benchmark of the tiny shape, one round each."""
    common = "bench --shape tiny --rounds 1 --warmup 0 --output"
    assert cli.main([*common.split(), str(tmp_path / "b"), *arguments.split()]) == 0
    return json.loads((tmp_path / "b.json").read_text())["variants"]


def test_packed_samples_of_different_lengths(tmp_path, monkeypatch, capsys):
    """Padding, tokens run and bytes are those of the layouts; the suffix pass splits its rows."""
    monkeypatch.setattr(grouping, "PASS", 0)
    monkeypatch.setattr(compare, "_peak_alone", lambda *args: 1)
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("60 4\n5, 20\n\n9 9\n30 2\n")
    variants = ["suffix, stored", "suffix, recomputed", "full, all routed"]
    rows = bench(tmp_path, f"--packed --lengths {lengths} --batch 4 --checkpointing")
    assert list(rows) == list(VARIANTS)
    stored, again, full = (rows[name] for name in variants)
    real = 64 + 25 + 18 + 32
    assert full["tokens"] == {"batch": real, "real": real, "run": real, "run_real": real, "parts": 0}
    assert full["padding"] == 0 and full["run_of_real"] == 1
    assert stored["tokens"] == again["tokens"] and stored["tokens"]["parts"] == 4
    assert stored["tokens"]["run_real"] == 3 + 19 + 8 + 1
    assert rows[BASELINE]["padding"] is None and rows[BASELINE]["saved_bytes_ratio"] == 1
    assert again["saved_bytes"] < stored["saved_bytes"] and again["saved_bytes"] < full["saved_bytes"]
    assert all(row["saved_bytes"] <= row["counted_peak"] for row in rows.values())
    assert "padding" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "which is neither lognormal nor uniform nor a text file"),
        ("", "holds no lengths"),
        ("256 16\n256 one\n", "Line 2 of .* is '256 one'"),
        ("256 1\n", "at least 2, since the echo reaches no answer of one token"),
        ("256\n", "Write the tokens of a prompt"),
    ],
)
def test_files_of_lengths_that_cannot_be_used(tmp_path, text, words):
    path = tmp_path / "lengths.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=words):
        lengths_of(str(path), 1, 2, 3)


def test_lengths_are_the_same_every_time():
    assert lengths_of(None, 7, 3, 2) == [(7, 3), (7, 3)]
    for kind in ("lognormal", "uniform"):
        found = lengths_of(kind, 200, 40, 500)
        assert found == lengths_of(kind, 200, 40, 500)
        assert min(p for p, _ in found) >= 1 and min(a for _, a in found) >= 2
        assert 150 < sorted(p for p, _ in found)[250] < 250
