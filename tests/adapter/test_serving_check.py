"""The table of good and broken adapters: what `check_adapter` must say of each, for every engine.

Signs, in the order vLLM, TGI, LoRAX, SGLang, llama.cpp: ✓ serves, ✗ refuses, ∅ silently wrong, ? unknown. They were
written down from measurements, not from the rules.
"""

import json
import shutil

import adapter_cases as make
import pytest
from adapter_cases import drop, value
from rich.console import Console
from serving_cases import GOOD, LLAMA, OTHERS, Q0, SIGNS

from echo_trainer.adapter.check import check_adapter
from echo_trainer.adapter.engines import COLUMNS, ENGINES
from echo_trainer.adapter.folder import AdapterError
from echo_trainer.adapter.portable import make_portable
from echo_trainer.adapter.rules import RULES, UNREADABLE


@pytest.fixture(scope="module")
def plain(bases, tmp_path_factory):
    return make.save_adapter(bases["llama"], tmp_path_factory.mktemp("plain") / "adapter")


def signs(report):
    measured = COLUMNS[: len(GOOD.split())]  # the others are not in the table
    return " ".join(SIGNS[report.verdicts[engine]] for engine in measured)


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


def test_every_sign_has_a_column():
    assert set(COLUMNS) <= set(ENGINES)
    for rule in (*RULES, *UNREADABLE):
        assert len(GOOD.split()) <= len(rule.signs.split()) <= len(COLUMNS), rule.name


def test_every_rule_is_in_the_table():
    named = {case[1] for case in LLAMA.values()} | {case[2] for case in OTHERS.values()}
    assert {rule.name for rule in (*RULES, *UNREADABLE)} - named == {
        "depth-unknown", "module-type", "experts-unknown", "new-tokens", "peft-refuses",
    }  # fmt: skip
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
    # Widths differ between layers of some families: without the base nothing is known of them.
    make.reshape("layers.0.mlp.up_proj.lora_A", lambda t: t[:, :9])(adapter)
    assert [finding.rule.name for finding in check_adapter(adapter).findings] == ["untrained-layers"]


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
