"""Exports: what is written, whether the reported logit errors are true, and that failures leave nothing behind."""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys

import adapter_cases as make
import pytest
import torch
from adapter_cases import ALL
from paths import EXAMPLE_CARD

from echo_trainer.adapter.check import check_adapter
from echo_trainer.adapter.folder import AdapterError
from echo_trainer.adapter.logit_error import ExportError, probe_ids
from echo_trainer.cli import serving as cli_serving
from echo_trainer.export import forms as export
from echo_trainer.export.forms import export_lora, export_merged, export_portable
from echo_trainer.export.gguf import export_gguf
from echo_trainer.report.folder import saved_facts, update_record
from echo_trainer.report.render import render_card

FULL = {"r": 4, "target_modules": ["q_proj", "o_proj"]}  # modules that a LoRA of rank 32 can replace exactly
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture(scope="module")
def dora(bases, tmp_path_factory):
    return make.save_adapter(bases["llama"], tmp_path_factory.mktemp("dora") / "a", use_dora=True, r=4)


@pytest.fixture
def run(capsys):
    """Run the command line; returns the exit status and what was printed to both streams."""
    parser = argparse.ArgumentParser(prog="echo-trainer")
    subparsers = parser.add_subparsers(required=True)
    cli_serving.add_check_parser(subparsers)
    cli_serving.add_export_parser(subparsers)

    def run_(*words):
        arguments = parser.parse_args([str(word) for word in words])
        status = arguments.func(arguments)
        return status, *capsys.readouterr()

    return run_


def with_peft(base, adapter=None):
    """Logits on the probe sequences, computed here with PEFT."""
    model = make.load_base(base)
    if adapter:
        model = make.PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        return model(probe_ids(model.config)).logits


@pytest.mark.parametrize(("family", "settings"), [
    ("llama", {}),
    ("llama", {"use_dora": True}),
    ("llama", {"use_rslora": True, "r": 12, "layers_to_transform": [1]}),
    ("llama", {"modules_to_save": ["lm_head"]}),
    ("qwen2", {"bias": "lora_only"}),
    ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ("llama-tied", {"target_modules": ATTENTION}),
    ("llama-tied", {"target_modules": ["lm_head", "q_proj"]}),
    ("llama-tied", {"target_modules": ["embed_tokens"]}),
    ("llama-tied", {"target_modules": ["embed_tokens", "lm_head"]}),
])  # fmt: skip
def test_merged_in_float32_equals_peft(family, settings, bases, tmp_path):
    adapter = make.save_adapter(bases[family], tmp_path / "a", **settings)
    error = export_merged(adapter, tmp_path / "merged", dtype="float32")
    difference = (with_peft(tmp_path / "merged") - with_peft(bases[family], adapter)).abs()
    assert difference.max() < 1e-4
    assert error.largest < 1e-4
    assert error.same_top > 0.99
    assert not (tmp_path / "merged/adapter_config.json").exists()


def test_merged_in_bfloat16_reports_the_true_error(bases, dora, tmp_path):
    error = export_merged(dora, tmp_path / "merged", bases["llama"])
    original, plain, merged = (
        with_peft(bases["llama"], dora),
        with_peft(bases["llama"]),
        with_peft(tmp_path / "merged"),
    )
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "bfloat16"
    assert error.largest == pytest.approx((merged - original).abs().max().item(), rel=1e-3)
    assert error.mean == pytest.approx((merged - original).abs().mean().item(), rel=1e-3)
    assert error.effect == pytest.approx((original - plain).abs().mean().item(), rel=1e-3)
    assert error.same_top == pytest.approx((merged.argmax(-1) == original.argmax(-1)).float().mean().item())
    assert 0 < error.mean < 0.05 * error.effect
    assert error.positions == 256


def test_merging_nan_is_refused_and_leaves_nothing(bases, tmp_path):
    adapter = make.save_adapter(bases["llama"], tmp_path / "a")
    make.value("model.layers.0.self_attn.q_proj.lora_B.weight", float("nan"))(adapter)
    named = r"non-finite.*base_model\.model\.model\.layers\.0\.self_attn\.q_proj\.lora_B\.weight.*NaN"
    for function in (export_merged, export_lora, export_portable):
        with pytest.raises(ExportError, match=named):
            function(adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


Q1 = "model.layers.1.self_attn.q_proj"
DORA = {"use_dora": True}
BROKEN = {  # name: (settings, change of the files, what the message must name)
    "B deleted": ({}, make.drop(f"{Q1}.lora_B"), f"{Q1}.lora_A"),
    "A deleted": ({}, make.drop(f"{Q1}.lora_A"), f"{Q1}.lora_B"),
    "B renamed": ({}, make.rename(f"{Q1}.lora_B", f"{Q1}.lora_X"), f"{Q1}.lora_X"),
    "module renamed": ({}, make.rename(f"{Q1}.", "model.layers.1.self_attn.query."), "self_attn.query"),
    "layer renamed": ({}, make.rename("layers.1.", "layers.7."), "layers.7."),
    "prefix lost": ({}, make.rename("base_model.model.", ""), "key-prefix"),
    "another name left in": ({}, make.rename("lora_B.weight", "lora_B.mine.weight"), "lora_B.mine"),
    "a tensor too many": ({}, make.add(base_model__model__model__x__weight=torch.ones(3)), "model.x.weight"),
    "targets left out": ({}, make.config(target_modules=ALL[1:]), "q_proj"),
    "no tensors": ({}, make.drop(""), "no lora_A"),
    "rank": ({}, make.config(r=32), "config 32"),
    "alpha left out": ({}, make.config(lora_alpha=...), "lora_alpha"),
    "alpha in words": ({}, make.config(lora_alpha="32"), "'32'"),
    "no shape": ({}, make.reshape(f"{Q1}.lora_A", lambda t: torch.empty(0)), f"{Q1}"),
    "flag lost": (DORA, make.config(use_dora=False), "lora_magnitude_vector"),
    "magnitudes lost": (DORA, make.drop("lora_magnitude"), "has no lora_magnitude_vector"),
    "a magnitude lost": (DORA, make.drop(f"{Q1}.lora_magnitude"), f"{Q1} has no lora_magnitude_vector"),
    "dora, B deleted": (DORA, make.drop(f"{Q1}.lora_B"), f"{Q1}.lora_A"),
    "only the magnitude left": (DORA, make.drop(f"{Q1}.lora_A", f"{Q1}.lora_B"), f"{Q1}.lora_A"),
    "another method": ({}, make.config(peft_type="IA3"), "peft_type"),
    "saved module lost": ({"modules_to_save": ["lm_head"]}, make.drop("lm_head"), "lm_head"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("form", ["merged", "lora"])
def test_broken_adapters_are_refused_in_plain_words(form, name, bases, tmp_path, run, recwarn):
    settings, change, named = BROKEN[name]
    adapter = make.save_adapter(bases["llama"], tmp_path / "a", **settings)
    change(adapter)
    status, printed, error = run("export", f"--{form}", adapter, tmp_path / "out")
    assert (status, printed) == (2, "")
    said = error[error.index("error: ") :]  # after the progress bar of loading the base
    assert named in said and len(said.splitlines()) == 1, error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    assert not [each for each in recwarn if "adapter keys" in str(each.message)]


def test_portable_refuses_a_dora_that_lost_its_magnitudes_without_offering_a_merge(bases, tmp_path, run):
    adapter = make.save_adapter(bases["llama"], tmp_path / "a", use_dora=True)
    make.drop("lora_magnitude")(adapter)
    status, _, error = run("export", "--portable", adapter, tmp_path / "out")
    assert status == 2 and "magnitudes are absent" in error and "--merged" not in error


@pytest.mark.parametrize("settings", [{}, DORA])
def test_modules_without_any_tensor_were_not_trained(settings, bases, tmp_path, run, recwarn):
    """`check` names them, and no engine minds but TGI and LoRAX: merging leaves them as they are in the base."""
    adapter = make.save_adapter(bases["llama"], tmp_path / "a", **settings)
    make.drop(f"{Q1}.")(adapter)
    assert run("export", "--merged", adapter, tmp_path / "out", "--dtype", "float32")[0] == 0
    weight = f"{Q1}.weight"
    merged, base = (make.load_base(folder).state_dict() for folder in (tmp_path / "out", bases["llama"]))
    torch.testing.assert_close(merged[weight], base[weight])
    assert not torch.equal(merged[weight.replace("q_proj", "k_proj")], base[weight.replace("q_proj", "k_proj")])
    assert not [each for each in recwarn if "adapter keys" in str(each.message)]


def test_modules_without_any_tensor_are_refused_where_peft_makes_up_a_change(bases, tmp_path, run):
    adapter = make.save_adapter(bases["llama"], tmp_path / "a")
    make.drop(f"{Q1}.")(adapter)
    make.edit_config(adapter, init_lora_weights=False)  # PEFT then fills lora_B with random numbers
    status, _, error = run("export", "--merged", adapter, tmp_path / "out")
    assert status == 2 and f"{Q1}.lora_B" in error


OTHER_BASES = {
    "wider": lambda: make.LlamaConfig(**{**make._SIZES, "hidden_size": 64, "intermediate_size": 96}),
    "fewer layers": lambda: make.LlamaConfig(**{**make._SIZES, "num_hidden_layers": 2}),
    "other names": make.CONFIGS["gpt2"],
}


@pytest.mark.parametrize("form", ["portable", "merged", "lora"])
@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("name", OTHER_BASES)
def test_another_base_is_refused_in_one_sentence(name, settings, form, bases, tmp_path, run, monkeypatch):
    if settings and form != "merged":
        settings = {"use_dora": True} if form == "lora" else {"r": 8}
    monkeypatch.setitem(make.CONFIGS, "other", OTHER_BASES[name])
    other = make.save_base("other", tmp_path / "other")
    adapter = make.save_adapter(bases["llama"], tmp_path / "a", **settings)
    status, printed, error = run("export", f"--{form}", adapter, tmp_path / "out", "--base", other)
    said = error[error.index("error: ") :]
    assert (status, printed) == (2, "")
    assert len(said.splitlines()) == 1 and len(said) < 900 and "size mismatch" not in said, said
    assert "the adapter was trained on" in said or "it was trained on" in said
    assert not (tmp_path / "out").exists()


def test_failed_save_leaves_nothing(bases, dora, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(export, "_save_tokenizer", fail)
    with pytest.raises(OSError, match="no space"):
        export_merged(dora, tmp_path / "merged", bases["llama"])
    assert list(tmp_path.iterdir()) == []


def test_lora_of_a_dora(bases, tmp_path):
    """Full rank (32) fits exactly, magnitudes included; a low rank does not, and the report says how much."""
    dora = make.save_adapter(bases["llama"], tmp_path / "a", use_dora=True, **FULL)
    full = export_lora(dora, tmp_path / "full", bases["llama"], rank=32)
    low = export_lora(dora, tmp_path / "low", bases["llama"], rank=2)
    assert full.largest < 1e-3
    assert full.same_top > 0.99
    assert low.mean > 100 * full.mean
    assert low.effect == pytest.approx(full.effect)
    for name, error in (("full", full), ("low", low)):
        assert check_adapter(tmp_path / name, base=bases["llama"]).ok
        difference = (with_peft(bases["llama"], tmp_path / name) - with_peft(bases["llama"], dora)).abs()
        assert error.mean == pytest.approx(difference.mean().item(), rel=0.05, abs=1e-5)


def add_run(adapter, base):
    """Put the record, card, curves and results of a run beside the adapter, as a finished run has them."""
    record = json.loads((EXAMPLE_CARD / "echo_run.json").read_text())
    config = json.loads((adapter / "adapter_config.json").read_text())
    record["adapter"] |= {"r": config["r"], "use_dora": config["use_dora"]}
    record |= {"saved": saved_facts(check_adapter(adapter, base=base)), "repo_id": "ada/mine"}
    (adapter / "echo_run.json").write_text(json.dumps(record))
    (adapter / "README.md").write_text(render_card(record))
    shutil.copytree(EXAMPLE_CARD / "assets", adapter / "assets")
    (adapter / ".eval_results").mkdir()
    (adapter / ".eval_results/boolq.yaml").write_text("value: 0.7\n")
    return record


def checksum(adapter):
    return hashlib.sha256((adapter / make.WEIGHTS).read_bytes()).hexdigest()


@pytest.mark.parametrize(("rank", "size"), [(8, "of rank 8 "), (0.9, "that keeps 0.9 of each weight change")])
def test_card_of_a_fitted_lora_claims_nothing_of_the_dora(rank, size, bases, tmp_path):
    dora = make.save_adapter(bases["llama"], tmp_path / "a", use_dora=True, r=8)
    before = add_run(dora, bases["llama"])
    assert before["evaluation"] and "model-index" in (dora / "README.md").read_text()
    error = export_lora(dora, tmp_path / "out", bases["llama"], rank=rank)
    record = json.loads((tmp_path / "out/echo_run.json").read_text())
    card = (tmp_path / "out/README.md").read_text()
    assert (record["evaluation"], record["repo_id"]) == (None, None)
    assert record["saved"]["method"] == "LoRA"
    assert record["saved"]["sha256"] == checksum(tmp_path / "out") != before["saved"]["sha256"]
    assert set(record["saved"]["engines"].values()) == {"serves"}
    assert size in record["derived"] and checksum(dora) in record["derived"] and str(error) in record["derived"]
    assert card == render_card(record) and record["derived"] in card and str(tmp_path) not in card
    assert "# LoRA adapter" in card and f"safetensors` | `{checksum(tmp_path / 'out')}`" in card
    for claim in ("saved rank", "model-index", "DoRA adapter for", "- dora", "0.93", "No serving engine"):
        assert claim not in card, claim
    assert not (tmp_path / "out/.eval_results").exists()
    assert (tmp_path / "out/assets/training.png").exists()
    assert update_record(tmp_path / "out", evaluation=before["evaluation"])  # of its own, measured later
    assert record["derived"] in (tmp_path / "out/README.md").read_text()


def test_a_fitted_lora_has_no_card_that_is_not_made_from_a_record(bases, tmp_path):
    dora = make.save_adapter(bases["llama"], tmp_path / "a", use_dora=True, r=4)
    (dora / "README.md").write_text("# A DoRA adapter, by hand")
    (dora / "tokenizer.json").write_text("{}")
    export_lora(dora, tmp_path / "out", bases["llama"], rank=4)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"adapter_config.json", make.WEIGHTS,
                                                                    "tokenizer.json"}  # fmt: skip
    for number, damaged in enumerate(('{"evaluation": [1]}', "{", '{"saved": {}}')):
        (dora / "echo_run.json").write_text(damaged)
        out = tmp_path / f"out{number}"
        export_lora(dora, out, bases["llama"], rank=4)
        assert not (out / "echo_run.json").exists() and not (out / "README.md").exists()


def test_card_of_the_portable_form_keeps_results_and_says_its_own_checksum(bases, tmp_path):
    adapter = make.save_adapter(bases["llama"], tmp_path / "a", r=8)
    before = add_run(adapter, bases["llama"])
    export_portable(adapter, tmp_path / "out", bases["llama"])
    record = json.loads((tmp_path / "out/echo_run.json").read_text())
    card = (tmp_path / "out/README.md").read_text()
    assert record["evaluation"] == before["evaluation"] and "model-index" in card
    assert (tmp_path / "out/.eval_results/boolq.yaml").exists()
    assert record["saved"]["sha256"] == checksum(tmp_path / "out") and checksum(tmp_path / "out") in card
    assert "trained rank 8, saved rank 16" in card and "not the weights that the run trained" not in card


def test_merged_model_has_no_card_of_an_adapter(bases, tmp_path):
    adapter = make.save_adapter(bases["llama"], tmp_path / "a", use_dora=True)
    add_run(adapter, bases["llama"])
    export_merged(adapter, tmp_path / "out", bases["llama"])
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"config.json", "generation_config.json", "model.safetensors"}


@pytest.mark.parametrize("rank", [None, 0.9])
def test_lora_of_a_dora_with_chosen_rank(rank, bases, dora, tmp_path):
    error = export_lora(dora, tmp_path / "out", bases["llama"], rank=rank)
    assert check_adapter(tmp_path / "out", base=bases["llama"]).ok
    assert 0 <= error.mean < error.effect


def test_lora_of_a_dora_on_some_layers(bases, tmp_path):
    adapter = make.save_adapter(bases["llama"], tmp_path / "a", use_dora=True, layers_to_transform=[1], **FULL)
    assert export_lora(adapter, tmp_path / "out", bases["llama"], rank=32).largest < 1e-3


def test_lora_of_a_dora_on_gpt2(bases, tmp_path):
    settings = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True, "r": 4}
    adapter = make.save_adapter(bases["gpt2"], tmp_path / "a", **settings)
    assert export_lora(adapter, tmp_path / "out", bases["gpt2"], rank=32).largest < 1e-3


def test_lora_refuses_saved_modules(bases, tmp_path):
    adapter = make.save_adapter(bases["llama"], tmp_path / "a", use_dora=True, modules_to_save=["lm_head"])
    with pytest.raises(AdapterError, match="--merged"):
        export_lora(adapter, tmp_path / "out", bases["llama"])


def test_portable(bases, tmp_path):
    adapter = make.save_adapter(bases["llama"], tmp_path / "a", use_rslora=True, r=12)
    assert export_portable(adapter, tmp_path / "out") == tmp_path / "out"
    assert check_adapter(tmp_path / "out").ok
    assert (tmp_path / "out").stat().st_mode & 0o055 == 0o055
    assert {path.name for path in tmp_path.iterdir()} == {"a", "out"}


@pytest.mark.parametrize("function", [export_portable, export_merged, export_lora])
def test_nothing_is_overwritten(function, bases, dora, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="exists already"):
        function(make.save_adapter(bases["llama"], tmp_path / "a"), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"mine.txt", "a"}


def test_gguf_without_the_converter_says_how_to_get_it(bases, dora, tmp_path, monkeypatch):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    adapter = make.save_adapter(bases["llama"], tmp_path / "a")
    with pytest.raises(ExportError, match="git clone"):
        export_gguf(adapter, tmp_path / "a.gguf")
    with pytest.raises(ExportError, match="no file"):
        export_gguf(adapter, tmp_path / "a.gguf", converter=tmp_path / "nothing.py")


def test_gguf_reports_a_failing_converter(bases, tmp_path):
    """A real process that fails: its last words reach the user and no file appears."""
    adapter = make.save_adapter(bases["llama"], tmp_path / "a")
    script = tmp_path / "convert_lora_to_gguf.py"
    script.write_text("import sys; sys.exit('Model architecture not supported')")
    with pytest.raises(ExportError, match="architecture not supported"):
        export_gguf(adapter, tmp_path / "a.gguf", converter=script)
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.skipif(not os.environ.get("LLAMA_CPP"), reason="set LLAMA_CPP to a llama.cpp checkout")
def test_gguf_through_llama_cpp(bases, tmp_path):
    """The tensors and alpha in the GGUF file give the weight change of the trained adapter."""
    from gguf import GGUFReader

    adapter = make.save_adapter(bases["llama"], tmp_path / "a", use_rslora=True, r=12, layers_to_transform=[1])
    out = export_gguf(adapter, tmp_path / "adapter.gguf")
    reader = GGUFReader(out)
    values = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    alpha = float(reader.fields["adapter.lora.alpha"].parts[-1][0])
    assert len(values) == 2 * 3 * 7
    trained = make.load_file(adapter / make.WEIGHTS)
    a, b = (trained[f"base_model.model.model.layers.1.mlp.up_proj.lora_{side}.weight"] for side in "AB")
    a_gguf, b_gguf = (values[f"blk.1.ffn_up.weight.lora_{side}"] for side in "ab")
    torch.testing.assert_close(alpha / 16 * b_gguf @ a_gguf, 32 / 12**0.5 * b @ a)


@pytest.mark.parametrize(("words", "status"), [
    (["check", "dora"], 1),
    (["check", "nothing"], 2),
    (["check", "dora", "--base", "nowhere"], 2),
    (["export", "--portable", "dora", "out"], 2),
    (["export", "--merged", "dora", "out"], 0),
    (["export", "--lora", "dora", "out", "--rank", "16"], 0),
    (["export", "--lora", "dora", "out", "--rank", "0.9"], 0),
    (["export", "--gguf", "dora", "dora"], 2),
])  # fmt: skip
def test_command_line(words, status, run, dora, tmp_path):
    places = {"dora": dora, "out": tmp_path / "out", "nowhere": tmp_path / "nowhere"}
    got, *printed = run(*[places.get(word, word) for word in words])
    printed = "".join(printed)
    assert got == status, printed
    assert (tmp_path / "out").exists() == (status == 0)
    if "dora" in words and "nowhere" not in words and words[1] not in ("--gguf", "--lora"):
        assert "DoRA" in printed or "logit error" in printed
    if words[1] == "--lora":
        assert run("check", tmp_path / "out", "--json", "--base", dora.parent)[0] == 2
        assert run("check", tmp_path / "out", "--engine", "tgi")[0] == 0


def test_command_line_json(run, bases, tmp_path):
    make.save_adapter(bases["llama"], tmp_path, target_modules=list(ALL))
    status, printed, _ = run("check", tmp_path, "--json", "--headers-only")
    assert status == 0
    assert json.loads(printed)["ok"] is True


def test_help_reads_without_torch():
    """The parsers are built on every start of the command line, so they must not import torch."""
    code = """if True:
        import argparse, sys
        from echo_trainer.cli import serving
        parser = argparse.ArgumentParser(prog="echo-trainer"); sub = parser.add_subparsers()
        for add in (serving.add_check_parser, serving.add_export_parser): print(add(sub).format_help())
        assert "torch" not in sys.modules"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for word in ("exit status", "--merged", "--engine", "examples", "a multiple of 16"):
        assert word in done.stdout
    assert max(map(len, done.stdout.splitlines())) < 120
