"""The benchmark runs every variant on a tiny model and reports what it promises."""

import json

import pytest

from echo_trainer import cli
from echo_trainer.bench.compare import check_pass, run_bench
from echo_trainer.bench.step import BASELINE, VARIANTS, BenchOptions
from echo_trainer.compat.cache import PrefixCache


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
    assert "full, all" in capsys.readouterr().out


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
