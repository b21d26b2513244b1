"""The table of good and broken adapters: what `check_adapter` must say of each, for every engine.

Signs, in the order vLLM, TGI, LoRAX, SGLang, llama.cpp: ✓ serves, ✗ refuses, ∅ silently wrong, ? unknown. They were
written down from measurements, not from the rules.
"""

import json
import shutil

import adapter_cases as make
import pytest
import torch
from adapter_cases import ALL, add, config, drop, rename, reshape, value
from peft import AdaLoraConfig, IA3Config
from rich.console import Console

from echo_trainer.adapter.check import check_adapter
from echo_trainer.adapter.folder import AdapterError
from echo_trainer.adapter.portable import make_portable
from echo_trainer.adapter.rules import ENGINES, RULES, UNREADABLE

SIGNS = {"serves": "✓", "refuses": "✗", "silently-wrong": "∅", "unknown": "?"}
Q0 = "model.layers.0.self_attn.q_proj"
GOOD = "✓ ✓ ✓ ✓ ✓"
WIDE = torch.ones(3)
INF = float("inf")
IA3 = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
ADALORA = AdaLoraConfig(target_modules=["q_proj", "v_proj"], total_step=10)

# name: (verdicts, rule that must be named, settings of the trained adapter, change of its files)
LLAMA = {
    # good adapters: no false alarm
    "plain": (GOOD, None, {}, None),
    "rank 32": (GOOD, None, {"r": 32}, None),
    "rank 512": (GOOD, None, {"r": 512}, None),
    "attention only": (GOOD, None, {"target_modules": ["q_proj", "k_proj", "v_proj"]}, None),
    "q and v": (GOOD, None, {"target_modules": ["q_proj", "v_proj"]}, None),
    "mlp only": (GOOD, None, {"target_modules": ["gate_proj", "up_proj", "down_proj"]}, None),
    "all-linear": (GOOD, None, {"target_modules": "all-linear"}, None),
    "bfloat16": (GOOD, None, {"dtype": torch.bfloat16}, None),
    "gaussian init": (GOOD, None, {"init_lora_weights": "gaussian"}, None),
    "orthogonal init": (GOOD, None, {"init_lora_weights": "orthogonal"}, None),
    "dropout": (GOOD, None, {"lora_dropout": 0.1}, None),
    "every layer by number": (GOOD, None, {"layers_to_transform": [0, 1, 2]}, None),
    "patterns that match nothing": (GOOD, None, {"rank_pattern": {"x": 3}, "alpha_pattern": {"x": 5}}, None),
    "a setting of a newer peft": (GOOD, None, {}, config(setting_of_2031=True)),
    "training files beside it": (GOOD, None, {}, make.write("training_args.bin", "x")),
    # features
    "dora": ("✗ ∅ ∅ ✗ ✗", "dora", {"use_dora": True}, None),
    "magnitudes, flag lost": ("✗ ∅ ∅ ? ✗", "magnitudes-without-flag", {"use_dora": True}, config(use_dora=False)),
    "magnitudes lost": ("✗ ∅ ∅ ✗ ?", "magnitudes-missing", {"use_dora": True}, drop("lora_magnitude")),
    "one magnitude lost": ("✗ ∅ ∅ ✗ ?", "magnitudes-missing", {"use_dora": True}, drop(f"{Q0}.lora_magnitude")),
    "saved module": ("✗ ∅ ∅ ∅ ✗", "saved-modules", {"modules_to_save": ["lm_head"]}, None),
    "saved norm": ("✗ ∅ ∅ ∅ ✗", "saved-modules", {"modules_to_save": ["norm"]}, None),
    "bias announced, none there": ("✗ ✓ ✓ ✓ ✓", "bias-setting", {"bias": "all"}, None),
    "lora bias": ("✗ ∅ ∅ ∅ ✗", "bias", {"lora_bias": True}, None),
    "rslora": ("✓ ✓ ∅ ∅ ∅", "rslora", {"use_rslora": True}, None),
    "rank pattern by layer": ("✓ ✗ ✗ ∅ ✓", "mixed-ranks", {"rank_pattern": {"layers.1.mlp.up_proj": 32}}, None),
    "rank pattern by type": ("✓ ∅ ∅ ∅ ✓", "rank-pattern", {"rank_pattern": {"up_proj": 32}}, None),
    "alpha pattern": ("✓ ∅ ∅ ∅ ∅", "alpha-pattern", {"alpha_pattern": {"q_proj": 8}}, None),
    "rank 12": ("✓ ∅ ∅ ✓ ✓", "rank-block", {"r": 12}, None),
    "rank 8": ("✓ ∅ ∅ ✓ ✓", "rank-block", {"r": 8}, None),
    "rank 528": ("✗ ✓ ✓ ✓ ✓", "rank-too-large", {"r": 528}, None),
    "first layer only": ("✓ ∅ ∅ ✓ ✓", "untrained-layers", {"layers_to_transform": [0]}, None),
    "middle layer left out": ("✓ ∅ ∅ ✓ ✓", "untrained-layers", {"layers_to_transform": [0, 2]}, None),
    "one module left out": ("✓ ∅ ∅ ✓ ✓", "untrained-layers", {"exclude_modules": ["layers.2.mlp.up_proj"]}, None),
    "regex": ("✓ ✓ ✓ ✗ ✓", "regex-targets", {"target_modules": r".*\.(q|k|v)_proj"}, None),
    "q alone": ("✓ ✓ ✓ ✗ ✓", "q-without-v", {"target_modules": ["q_proj", "o_proj"]}, None),
    "v alone": ("✓ ✓ ✓ ✗ ✓", "q-without-v", {"target_modules": ["v_proj"]}, None),
    "k alone": ("✓ ✓ ✓ ✗ ✓", "q-without-v", {"target_modules": ["k_proj"]}, None),
    "head": ("? ∅ ? ? ?", "embedding", {"target_modules": [*ALL, "lm_head"]}, None),
    "embedding": ("? ∅ ? ? ?", "embedding", {"target_modules": [*ALL, "embed_tokens"]}, None),
    "pissa": ("✗ ∅ ∅ ∅ ∅", "base-changed", {}, config(init_lora_weights="pissa_niter_4")),
    "olora": ("✗ ∅ ∅ ∅ ∅", "base-changed", {}, config(init_lora_weights="olora")),
    "corda": ("✗ ∅ ∅ ∅ ∅", "base-changed", {}, config(init_lora_weights="corda")),
    "loftq": ("✗ ∅ ∅ ∅ ∅", "base-changed", {}, config(init_lora_weights="loftq")),
    "trained tokens": ("✗ ∅ ∅ ∅ ✗", "trainable-tokens", {"trainable_token_indices": [1, 2]}, None),
    "layer replication": ("✗ ? ? ? ?", "variant", {}, config(layer_replication=[[0, 3]])),
    "activated lora": ("✗ ? ? ? ?", "variant", {}, config(alora_invocation_tokens=[1])),
    "trained parameters": ("? ? ? ? ?", "other-variant", {}, config(target_parameters=["mlp.experts.up"])),
    # disagreements
    "config rank too small": ("∅ ∅ ∅ ? ∅", "rank-disagrees", {"r": 32}, config(r=16)),
    "config rank too large": ("∅ ∅ ∅ ? ∅", "rank-disagrees", {}, config(r=32)),
    "narrow A": ("∅ ? ? ? ✗", "shape-disagrees", {}, reshape(f"{Q0}.lora_A", lambda t: t[:, :20])),
    "short B": ("∅ ? ? ? ✗", "shape-disagrees", {}, reshape(f"{Q0}.lora_B", lambda t: t[:20])),
    "another base's widths": ("∅ ? ? ? ✗", "shape-disagrees", {}, reshape("down_proj.lora_A", lambda t: t[:, :40])),
    "layer that is not there": ("∅ ∅ ∅ ? ✗", "unknown-module", {}, rename("layers.2.", "layers.7.")),
    "one prefix too many": ("∅ ∅ ∅ ? ✗", "unknown-module", {}, rename("model.model.", "model.model.model.")),
    "module that is not there": ("✗ ∅ ∅ ? ✗", "unknown-kind", {}, rename("up_proj", "wide_proj")),
    "adapter name left in": ("✗ ∅ ∅ ? ✗", "key-suffix", {}, rename(".weight", ".default.weight")),
    "no prefix": ("✓ ∅ ∅ ? ✓", "key-prefix", {}, rename("base_model.model.", "")),
    "echo tensors": ("✗ ∅ ∅ ? ✗", "foreign-tensor", {}, add(base_model__echo__p2__weight=WIDE)),
    "plain weight": ("✗ ∅ ∅ ? ✗", "foreign-tensor", {}, add(base_model__model__model__x__weight=WIDE)),
    "trained bias": ("✗ ∅ ∅ ∅ ✗", "bias", {}, add(base_model__model__model__layers__0__mlp__up_proj__bias=WIDE)),
    "B missing": ("✗ ∅ ∅ ? ✗", "b-missing", {}, drop(f"{Q0}.lora_B")),
    "A missing": ("∅ ∅ ∅ ? ✗", "a-missing", {}, drop(f"{Q0}.lora_A")),
    "ungathered shard": ("? ? ? ? ✗", "not-a-matrix", {}, reshape(f"{Q0}.lora_A", lambda t: torch.empty(0))),
    "integers": ("? ? ? ? ?", "not-floating", {}, reshape(f"{Q0}.lora_A", lambda t: t.to(torch.int8))),
    "tensors outside target_modules": ("∅ ∅ ∅ ? ∅", "outside-targets", {}, config(target_modules=ALL[:-1])),
    "no tensors": ("✗ ∅ ∅ ? ?", "no-lora-tensors", {}, drop("")),
    "nan": ("∅ ∅ ∅ ∅ ∅", "non-finite", {}, value(f"{Q0}.lora_B.weight", float("nan"))),
    "inf": ("∅ ∅ ∅ ∅ ∅", "non-finite", {}, value(f"{Q0}.lora_A.weight", INF)),
    "inf in bfloat16": ("∅ ∅ ∅ ∅ ∅", "non-finite", {"dtype": torch.bfloat16}, value(f"{Q0}.lora_A.weight", -INF)),
    "rank zero": ("✗ ✗ ✗ ✗ ✗", "bad-number", {}, config(r=0)),
    "alpha in words": ("✗ ✗ ✗ ✗ ✗", "bad-number", {}, config(lora_alpha="32")),
    "rank left out": ("✗ ∅ ∅ ✗ ?", "missing-setting", {"r": 8, "lora_alpha": 8}, config(r=...)),
    # files
    "two adapters in a folder": ("✓ ∅ ∅ ∅ ✓", "second-adapter-file", {}, make.copy_weights),
    "base weights beside it": ("✓ ✓ ✓ ? ✓", "other-safetensors", {}, make.foreign_file),
    "pickle": ("? ? ? ? ?", "pickle", {}, make.to_pickle),
    "no config": ("✗ ✗ ✗ ✗ ✗", "no-config", {}, make.remove("adapter_config.json")),
    "config not JSON": ("✗ ✗ ✗ ✗ ✗", "broken-config", {}, make.write("adapter_config.json", '{"r": 16,')),
    "config a list": ("✗ ✗ ✗ ✗ ✗", "broken-config", {}, make.write("adapter_config.json", "[]")),
    "pattern a list": ("? ? ? ? ?", "bad-setting", {}, config(rank_pattern=[1])),
    "targets a number": ("? ? ? ? ?", "bad-setting", {}, config(target_modules=3)),
    "no regular expression": ("? ? ? ? ?", "bad-setting", {}, config(target_modules="(q_proj")),
    "no weights": ("✗ ✗ ✗ ✗ ✗", "no-weights", {}, make.remove(make.WEIGHTS)),
    "weights cut short": ("✗ ✗ ✗ ✗ ✗", "broken-weights", {}, make.cut),
    "git-lfs pointer": ("✗ ✗ ✗ ✗ ✗", "lfs-pointer", {}, make.to_lfs_pointer),
    "lora called IA3": ("∅ ? ? ? ∅", "mislabelled", {}, config(peft_type="IA3")),
    "IA3": ("✗ ∅ ∅ ✗ ✗", "not-lora", {}, make.other_method(IA3)),
    "AdaLoRA": ("✗ ∅ ∅ ? ✗", "not-lora", {}, make.other_method(ADALORA)),
}  # fmt: skip
OTHERS = {  # on other bases
    "qwen2": ("qwen2", GOOD, None, {}),
    "qwen2, trained biases": ("qwen2", "✗ ∅ ∅ ∅ ✗", "bias", {"bias": "lora_only"}),
    "head of a tied base": ("llama-tied", "? ∅ ? ? ✗", "tied-head", {"target_modules": [*ALL, "lm_head"]}),
    "gpt2": ("gpt2", "✗ ∅ ? ? ✓", "family", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {family: make.save_base(family, folder / family) for family in make.CONFIGS}


@pytest.fixture(scope="module")
def plain(bases, tmp_path_factory):
    return make.save_adapter(bases["llama"], tmp_path_factory.mktemp("plain") / "adapter")


def signs(report):
    return " ".join(SIGNS[report.verdicts[engine]] for engine in ENGINES)


@pytest.mark.parametrize("name", LLAMA)
def test_table(name, bases, plain, tmp_path):
    expected, rule, settings, change = LLAMA[name]
    adapter = tmp_path / "adapter"
    shutil.copytree(plain, adapter) if not settings else make.save_adapter(bases["llama"], adapter, **settings)
    if change is not None:
        change(adapter)
    report = check_adapter(adapter, base=bases["llama"])
    found = [finding.rule.name for finding in report.findings]
    assert (signs(report), found if rule is None else rule in found) == (expected, [] if rule is None else True), found
    assert report.exit_status == (0 if expected == GOOD else 1 if set(expected) & set("✗∅") else 3)


@pytest.mark.parametrize("name", OTHERS)
def test_table_on_other_bases(name, bases, tmp_path):
    family, expected, rule, settings = OTHERS[name]
    make.save_adapter(bases[family], tmp_path, **settings)
    report = check_adapter(tmp_path, base=bases[family])
    found = [finding.rule.name for finding in report.findings]
    assert signs(report) == expected, found
    assert rule is None or rule in found


def test_every_rule_is_in_the_table():
    named = {case[1] for case in LLAMA.values()} | {case[2] for case in OTHERS.values()}
    assert {rule.name for rule in (*RULES, *UNREADABLE)} - named == {"depth-unknown", "module-type"}
    assert len(LLAMA) + len(OTHERS) >= 40


@pytest.mark.parametrize("name", ["rslora", "rank 12", "first layer only", "rank pattern by layer", "alpha pattern",
                                  "regex", "k alone", "bias announced, none there"])  # fmt: skip
def test_portable_form_passes_for_every_engine(name, bases, tmp_path):
    make.save_adapter(bases["llama"], tmp_path / "a", **LLAMA[name][2])
    assert not check_adapter(tmp_path / "a").ok
    make_portable(tmp_path / "a", bases["llama"], tmp_path / "b")
    assert check_adapter(tmp_path / "b", base=bases["llama"]).ok


def test_without_the_base(bases, plain, tmp_path):
    """Whatever needs the base is unknown, and a hole between trained layers is still seen."""
    adapter = shutil.copytree(plain, tmp_path / "a")
    make.edit_config(adapter, base_model_name_or_path="nobody/nothing")
    report = check_adapter(adapter)
    assert (signs(report), report.exit_status) == ("✓ ? ? ✓ ✓", 3)
    assert "--base" in report.notes[0]
    make.edit_tensors(adapter, lambda t: {k: v for k, v in t.items() if ".layers.1." not in k})
    assert signs(check_adapter(adapter)) == "✓ ∅ ∅ ✓ ✓"
    make.edit_tensors(
        adapter, lambda t: {k: v[:, :9] if "layers.0.mlp.up_proj.lora_A" in k else v for k, v in t.items()}
    )
    assert "shape-disagrees" in [finding.rule.name for finding in check_adapter(adapter).findings]


def test_base_is_found_by_the_name_in_the_config(bases, plain):
    report = check_adapter(plain)
    assert report.ok
    assert report.base == str(bases["llama"])


def test_base_may_be_a_model_a_peft_model_or_a_config(bases, plain):
    model = make.load_base(bases["llama"])
    adapted = make.PeftModel.from_pretrained(make.load_base(bases["llama"]), plain)
    for base in (model, adapted, model.config, str(bases["llama"])):
        assert check_adapter(plain, base=base).ok
    assert not check_adapter(plain, base=make.load_base(bases["gpt2"])).ok


def test_one_engine(bases, tmp_path):
    make.save_adapter(bases["llama"], tmp_path, use_rslora=True)
    assert check_adapter(tmp_path, engine="vllm").exit_status == 0
    assert check_adapter(tmp_path, engine="vllm").findings == []
    assert check_adapter(tmp_path, engine="lorax").exit_status == 1


def test_values_are_read_only_for_non_finite_numbers(plain, tmp_path):
    adapter = shutil.copytree(plain, tmp_path / "a")
    value(f"{Q0}.lora_B.weight", float("nan"))(adapter)
    assert check_adapter(adapter, values=False).ok
    finding = check_adapter(adapter).findings[0]
    assert finding.where == [f"base_model.model.{Q0}.lora_B.weight"]


def test_report_as_json_and_as_table(bases, tmp_path):
    make.save_adapter(bases["llama"], tmp_path, use_dora=True)
    report = check_adapter(tmp_path)
    data = json.loads(report.to_json())
    assert data["engines"]["tgi"] == {"verdict": "silently-wrong", "rules": ["dora"]}
    assert data["findings"][0]["where"] == ["use_dora=True"]
    assert str(tmp_path) in data["findings"][0]["fix"]
    console = Console(width=150, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    report.print(console)
    text = console.export_text()
    assert "silently-wrong" in text
    assert "export --merged" in text


def test_fixes_that_do_not_work_are_not_offered(bases, tmp_path):
    make.save_adapter(bases["llama"], tmp_path, use_dora=True, r=12)
    fixes = {found["rule"]: found["fix"] for found in check_adapter(tmp_path).to_dict()["findings"]}
    assert "--portable" not in fixes["rank-block"]
    assert "--merged" in fixes["dora"]


def test_a_merge_is_not_offered_where_it_would_invent_magnitudes(bases, tmp_path):
    make.save_adapter(bases["llama"], tmp_path, use_dora=True, r=12)
    drop("lora_magnitude")(tmp_path)
    findings = check_adapter(tmp_path).to_dict()["findings"]
    assert findings[0]["rule"] == "magnitudes-missing" and "absent" in findings[0]["says"]
    assert not any("--merged" in found["fix"] or "--portable" in found["fix"] for found in findings)


def test_a_git_lfs_pointer_is_fetched_and_not_copied_again(plain, tmp_path):
    adapter = shutil.copytree(plain, tmp_path / "a")
    make.to_lfs_pointer(adapter)
    text = check_adapter(adapter).to_json()
    assert "git lfs pull" in text and "cut short" not in text and "Copy it again" not in text
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors is a git-lfs pointer.*git lfs pull"):
        make_portable(adapter)


def test_notes_give_the_flags(bases, tmp_path):
    make.save_adapter(bases["llama"], tmp_path, r=48)
    notes = " ".join(check_adapter(tmp_path).notes)
    assert "--max-lora-rank 64" in notes
    assert "up to 6 GPUs" in notes


def test_bad_arguments(plain, tmp_path):
    with pytest.raises(AdapterError, match="vllm, tgi, lorax, sglang"):
        check_adapter(plain, engine="ollama")
    with pytest.raises(AdapterError, match="is not a folder"):
        check_adapter(tmp_path / "nothing")
    with pytest.raises(AdapterError, match="config of the base model"):
        check_adapter(plain, base=tmp_path)
