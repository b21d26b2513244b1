"""What `check` calls broken, and only that, PEFT's own loader refuses, loads in part or computes wrongly."""

import adapter_cases as make
import pytest
import torch
from peft_outcome import load_with_peft
from serving_cases import LLAMA, OTHERS

from echo_trainer.adapter.base import read_base
from echo_trainer.adapter.check import check_adapter
from echo_trainer.adapter.logit_error import probe_ids, reference
from echo_trainer.adapter.peft_load import load_without_weights
from echo_trainer.adapter.read import read_adapter
from echo_trainer.adapter.rules import RULES, UNREADABLE

CASES = {name: ("llama", *case[2:]) for name, case in LLAMA.items()}
CASES |= {name: (case[0], case[3], None) for name, case in OTHERS.items()}
ELSEWHERE = {"pickle", "loftq"}  # a test of its own below; needs a GPU
CHANGES_VALUES = {"integers"}  # what was trained is lost, and PEFT reads what is there


@pytest.mark.parametrize("name", [name for name in CASES if name not in ELSEWHERE])
def test_broken_is_what_peft_does_not_load_as_it_was_trained(name, bases, tmp_path):
    family, settings, change = CASES[name]
    adapter = make.save_adapter(bases[family], tmp_path / "a", **settings)
    trained = make.trained_logits(adapter)
    if change is not None:
        change(adapter)
    if name in ("IA3", "AdaLoRA", "prompt tuning"):  # another adapter by now
        trained = load_with_peft(bases[family], adapter).logits
    report = check_adapter(adapter, base=bases[family])
    broken = [found.rule.name for found in report.findings if found.rule.broken]
    outcome = load_with_peft(bases[family], adapter)
    right = outcome.how == "whole" if name in CHANGES_VALUES else outcome.is_what_was_trained(trained)
    assert right == (not broken), (broken, outcome.how, outcome.why)


def test_every_broken_rule_is_tried():
    tried = {case[1] for case in LLAMA.values()} | {case[2] for case in OTHERS.values()}
    broken = {rule.name for rule in (*RULES, *UNREADABLE) if rule.broken}
    assert broken - tried == {"peft-refuses"} and len(broken) > 20  # that one is tried below


@pytest.mark.parametrize("settings", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1, 2]}])
def test_what_no_rule_knows_is_said_in_the_words_of_peft(settings, bases, tmp_path):
    adapter = make.save_adapter(bases["llama"], tmp_path / "a", **settings)
    make.drop("lm_head", "embed_tokens")(adapter)
    found = {finding.rule.name: finding.where for finding in check_adapter(adapter, base=bases["llama"]).findings}
    assert load_with_peft(bases["llama"], adapter).how == "refuses"
    assert "which the config announces" in found["peft-refuses"][0]


def test_a_pickle_is_not_broken(bases, tmp_path):
    """PEFT loads it; whether that is wise is another question."""
    adapter = make.save_adapter(bases["llama"], tmp_path / "a")
    make.to_true_pickle(adapter)
    assert load_with_peft(bases["llama"], adapter).is_what_was_trained(make.trained_logits(adapter))
    report = check_adapter(adapter, base=bases["llama"])
    assert [found.rule.name for found in report.findings] == ["pickle"] and not report.findings[0].rule.broken


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_experts_are_not_called_broken_without_the_base_either(family, bases, tmp_path):
    settings = {"target_modules": ["q_proj", "k_proj", "v_proj"], "target_parameters": make.EXPERTS}
    adapter = make.save_adapter(bases[family], tmp_path / "a", **settings)
    make.edit_config(adapter, base_model_name_or_path="nobody/nothing")
    found = [finding.rule.name for finding in check_adapter(adapter).findings]
    assert found == ["experts-unknown", "depth-unknown"]


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]},
                                      {"trainable_token_indices": [3, 66]}])  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_a_resized_vocabulary_is_not_broken(family, settings, bases, tmp_path):
    """PEFT saves its embeddings, some of them twice, and loads them onto a base that is resized first."""
    base = make.load_base(bases[family])
    base.resize_token_embeddings(70)
    config = make.LoraConfig(r=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **settings)
    model = make.get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path)
    broken = [found.rule.name for found in check_adapter(tmp_path, base=bases[family]).findings if found.rule.broken]
    assert broken == []
    original, _, loaded = reference(tmp_path, bases[family])
    assert loaded.get_input_embeddings().weight.shape[0] == 70
    with torch.no_grad():
        expected = model(input_ids=probe_ids(loaded.config)).logits
    torch.testing.assert_close(original, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [
    {"modules_to_save": ["lm_head", "embed_tokens"]},
    {"trainable_token_indices": {"embed_tokens": [3, 4]}},
    {"layer_replication": [[0, 2], [0, 3], [1, 2]]},
    {"target_modules": "all-linear", "use_dora": True},
])  # fmt: skip
def test_peft_is_asked_without_a_weight(settings, bases, tmp_path):
    """Names and shapes alone, and nothing is said of an adapter that PEFT loads whole."""
    adapter = read_adapter(make.save_adapter(bases["llama"], tmp_path / "a", **settings))
    base = read_base(bases["llama"])
    assert {parameter.device.type for parameter in base.build().parameters()} == {"meta"}
    loaded = load_without_weights(adapter, base.build)
    assert (loaded.error, loaded.unexpected, loaded.mismatched, loaded.missing) == (None, set(), set(), set())
    assert "values" not in vars(adapter)  # no tensor was read
