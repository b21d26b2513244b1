"""The benchmark runs every variant on a tiny model and reports what it promises."""

import json

from echo_trainer import cli
from echo_trainer.bench.step import BASELINE, VARIANTS


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


def test_bench_refuses_an_answer_that_the_echo_cannot_reach(capsys):
    assert cli.main(["bench", "--answer", "1"]) == 2
    assert "would reach nothing" in capsys.readouterr().err
