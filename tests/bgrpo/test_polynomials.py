"""The recipe `polynomials`: its data, its verifier, its base and its command."""

import importlib.util
import json
import random
import sys
from collections import Counter
from pathlib import Path

import pytest
import sympy
from models import tiny_model
from paths import ROOT

from echo_trainer import check_adapter, cli

FOLDER = ROOT / "recipes" / "polynomials"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


polynomials = load("polynomials")
X = sympy.symbols("x")


def symbol(polynomial):
    return sum(c * X**i for i, c in enumerate(polynomial))


def pairs(n=60):
    generator = random.Random(3)
    for i in range(n):
        outer, inner = polynomials.DEGREES[i % 3]
        yield polynomials.draw(generator, outer), polynomials.draw(generator, inner)


def test_composition_is_that_of_sympy():
    for outer, inner in pairs():
        expected = sympy.Poly(sympy.expand(symbol(outer).subs(X, symbol(inner))), X).all_coeffs()[::-1]
        assert list(polynomials.compose(outer, inner)) == expected


def accepts(f, inner):
    return polynomials.right(f"{polynomials.to_text(f)} =", polynomials.to_text(inner), {})


def test_q_is_right_up_to_sign_and_constant():
    for outer, inner in pairs():
        f = polynomials.compose(outer, inner)
        for sign in (1, -1):
            for constant in (-7, 0, 4):
                other = tuple(sign * c for c in inner)
                assert accepts(f, (other[0] + constant, *other[1:]))


def test_the_outer_function_is_found():
    for outer, inner in pairs():
        f = polynomials.compose(outer, inner)
        assert polynomials.outer_of(f, inner) == outer
        minus = polynomials.outer_of(f, tuple(-c for c in inner))
        assert sympy.expand(symbol(minus).subs(X, -symbol(inner)) - symbol(f)) == 0


def test_a_gamed_verifier_is_caught():
    """What makes f = P(Q) true for every f: Q linear, Q = x, Q = f itself, up to sign and constant."""
    for outer, inner in pairs():
        f = polynomials.compose(outer, inner)
        for gamed in (
            (0, 1),
            (3, 1),
            (0, -1),
            (2, 1),
            f,
            tuple(-c for c in f),
            (f[0] + 1, *f[1:]),
            (5,),
            (0, 0, 1, 0),
        ):
            assert not accepts(f, gamed), gamed
        assert polynomials.outer_of(f, (0, 1)) == f and polynomials.outer_of(f, f) == (
            0,
            1,
        )  # and yet f is one of them


def test_wrong_ones_are_those_sympy_calls_wrong():
    """Q with one coefficient changed, and others' Q: right where sympy's remainders say so."""
    some = list(pairs(30))
    for i, (outer, inner) in enumerate(some):
        f = polynomials.compose(outer, inner)
        for other in ((inner[0], inner[1] + 1, *inner[2:]), (*inner[:-1], 2 * inner[-1]), some[i - 3][1]):
            assert accepts(f, other) is by_sympy(f, other)


def by_sympy(f, inner):
    rest, divisor = sympy.Poly(symbol(f), X, domain="QQ"), sympy.Poly(symbol(inner), X, domain="QQ")
    if not 1 < divisor.degree() < rest.degree():
        return False
    while not rest.is_zero:
        rest, remainder = sympy.div(rest, divisor)
        if remainder.degree() > 0 or not remainder.TC().is_integer:
            return False
    return True


@pytest.mark.parametrize("text", ["", "+", "1 +", "+ 1 + 2 + 0", "+ 12 + 1", "+ 1 * 2", "+ 1 - - 2", "- 0 2 = 1"])
def test_what_is_no_polynomial_is_wrong(text):
    assert polynomials.from_text(text) is None
    assert not polynomials.right("+ 1 + 0 + 2 + 0 + 1 =", text, {})


def test_texts_are_read_as_they_were_written():
    for outer, inner in pairs():
        for polynomial in (outer, inner, polynomials.compose(outer, inner)):
            assert polynomials.from_text(polynomials.to_text(polynomial)) == polynomial
    assert polynomials.to_text((-3, 0, 12)) == "- 3 + 0 + 1 2"


def test_rows_are_seeded_different_balanced_and_right():
    rows = polynomials.make_rows(900, 5)
    assert rows == polynomials.make_rows(900, 5) and rows[:300] == polynomials.make_rows(300, 5)
    assert len({row["prompt"] for row in rows}) == 900
    degrees = Counter(
        (len(polynomials.from_text(row["prompt"].removesuffix("="))), len(polynomials.from_text(row["completion"])))
        for row in rows
    )
    assert degrees == {(5, 3): 300, (7, 4): 300, (7, 3): 300}
    assert all(polynomials.right(row["prompt"], row["completion"], row) for row in rows)
    kept = frozenset(row["prompt"] for row in rows[:100])
    assert not kept & {row["prompt"] for row in polynomials.make_rows(900, 5, kept)}


def test_the_tokenizer_knows_every_word():
    tokenizer = load("make_base").make_tokenizer()
    for row in polynomials.make_rows(30, 1):
        ids = tokenizer(f"{row['prompt']} {row['completion']}")["input_ids"]
        assert tokenizer.pad_token_id not in ids
        assert tokenizer.decode(ids) == f"{row['prompt']} {row['completion']}"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder that `make_base.py` leaves, with a random tiny model in it."""
    folder = tmp_path_factory.mktemp("polynomials") / "base"
    tokenizer = load("make_base").make_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "prompts").mkdir()
    for split, count in (("train", 40), ("test", 6)):
        rows = [{"prompt": row["prompt"]} for row in polynomials.make_rows(count, count)]
        lines = [json.dumps(row) for row in rows]
        (folder / "prompts" / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


def test_the_command(base, tmp_path, monkeypatch, capsys):
    """The recipe as it ships, on a random model; then again, resumed, refused, and with an adapter to go on with."""
    monkeypatch.setenv("POLYNOMIALS", str(base))
    monkeypatch.chdir(tmp_path)
    few = ["--max_steps", "2", "--save_steps", "1", "--logging_steps", "1", "--beam_eval_widths", "1", "4"]
    few += ["--beam_eval_rows", "4", "--num_generations", "4", "--per_device_train_batch_size", "8"]
    assert cli.main(["bgrpo", "--config", "polynomials/bgrpo", *few]) == 0
    said = capsys.readouterr().out
    assert "Right on 4 held-out prompts, before training, by beam width: " in said and "num_beams=4" in said
    out = Path("polynomials-bgrpo")
    assert not [found for found in check_adapter(out, base=str(base)).findings if found.rule.broken]
    card = (out / "README.md").read_text()
    assert "| 1 (greedy) |" in card and "assets/beams.png" in card and (out / "assets/beams.png").is_file()
    assert json.loads((out / "echo_run.json").read_text())["bgrpo"]["verifier"] == "right"
    assert cli.main(["bgrpo", "--config", "polynomials/bgrpo", *few]) == 2
    assert "holds a finished run" in capsys.readouterr().err
    again = ["bgrpo", "--config", "polynomials/bgrpo", *few, "--resume_from_checkpoint", "true", "--max_steps", "3"]
    assert cli.main(again) == 0
    more = ["--adapter_name_or_path", str(out), "--output_dir", "more", "--beam_eval_rows", "0"]
    assert cli.main(["bgrpo", "--config", "polynomials/bgrpo", *few, *more]) == 0
    assert Path("more/adapter_config.json").is_file()


def test_a_base_is_made(tmp_path, monkeypatch):
    make = load("make_base")
    monkeypatch.setattr(make, "BATCH", 8)
    tokenizer = make.make_tokenizer()
    model = make.make_model(tokenizer, 0, 32, 1)
    before = model.model.embed_tokens.weight.detach().clone()
    make.train(model, polynomials.make_rows(24, 0), tokenizer, 0)
    assert (model.model.embed_tokens.weight != before).any()
    ids, labels = next(make.batches(polynomials.make_rows(8, 0), tokenizer, 0))
    rows = [row["completion"] for row in polynomials.make_rows(8, 0)]
    learnt = [tokenizer.decode(row[row != -100]) for row in labels]
    assert sorted(learnt) == sorted(f"{text} </s>" for text in rows) and ids.shape == labels.shape


def test_the_table_of_results(tmp_path):
    """Accuracies and paired differences in points, from hits by seed and prompt; and its picture."""
    import numpy as np

    measure = load("measure")
    draw = np.random.default_rng(0)
    base = (draw.random((1, 40)) < 0.4).astype(float).repeat(3, axis=0)
    better = np.maximum(base, draw.random((3, 40)) < 0.3)
    arms = {"sft": base, "grpo": base, "bgrpo": better}
    summary = measure.summarise({arm: dict.fromkeys(measure.WIDTHS, hits) for arm, hits in arms.items()})
    assert summary["accuracy"]["sft"]["10"]["value"] == pytest.approx(100 * base.mean(), abs=0.01)
    gains = {tuple(d["arms"]): d for d in summary["differences"] if d["width"] == 10}
    assert gains["bgrpo", "grpo"]["value"] == pytest.approx(100 * (better - base).mean(), abs=0.01)
    assert gains["bgrpo", "grpo"]["low"] > 0 and "p_corrected" not in gains["bgrpo", "grpo"]
    assert gains["grpo", "sft"]["value"] == gains["grpo", "sft"]["high"] == 0
    assert gains["bgrpo", "sft"]["p_corrected"] >= gains["bgrpo", "sft"]["p"]
    assert measure.table(summary).count("| BGRPO") == 3
    measure.draw(summary, tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").stat().st_size > 5000


@pytest.mark.parametrize("arm", ["grpo", "bgrpo"])
def test_an_arm_of_the_measurement(base, tmp_path, monkeypatch, arm):
    """One step of each arm; a run that is finished is kept."""
    measure = load("measure")
    monkeypatch.setitem(measure.SHARED, "max_steps", 1)
    monkeypatch.setattr(measure, "WIDTHS", (1, 2))
    rows = polynomials.make_rows(4, 3)
    found = measure.run(arm, str(base), 0, 1e-3, tmp_path, rows, "test")
    assert set(found["hits"]) == {"1", "2"} and len(found["hits"]["2"]) == 4
    monkeypatch.setattr(measure, "trainer_of", None)
    assert measure.run(arm, str(base), 0, 1e-3, tmp_path, rows, "test") == found
