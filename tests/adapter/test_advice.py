"""Every advice of `check`, carried out, gives what it promises: a sound adapter or model with the same logits."""

import re
import shutil

import adapter_cases as make
import pytest
import torch
from advice_cases import CASES, Broken, rules_broken
from peft_outcome import load_with_peft

from echo_trainer.adapter.rules import RULES, UNREADABLE
from echo_trainer.export.forms import export_merged

TABLE = {rule.name: rule for rule in (*RULES, *UNREADABLE)}
# Carried out in tests of their own below.
APART = {"base-lost", "new-tokens"}


def everything():
    return [
        pytest.param(rule, case, words, id=f"{number}-{rule}-{words}".replace(" ", "-"))
        for number, (rule, case) in enumerate(CASES)
        for words in case.fixes
    ]


@pytest.mark.parametrize(("name", "case", "words"), everything())
def test_advice(name, case, words, bases, tmp_path):
    assert words in TABLE[name].fix
    base, adapter = bases[case.family], tmp_path / "a"
    trained = make.save_adapter(base, tmp_path / "trained", **case.settings)
    shutil.copytree(trained, adapter)
    if case.change is not None:
        case.change(adapter)
    seen_with = {None: base, "": None}.get(case.seen_with, bases.get(case.seen_with))
    assert name in rules_broken(adapter, seen_with)
    before = load_with_peft(base, adapter)
    done = case.fixes[words](Broken(base, adapter, trained, tmp_path / "out"))
    # What was trained; or what PEFT makes of the files, where another adapter is in them.
    expected = before.logits if name in ("not-lora", "not-mergeable", "not-floating") else make.trained_logits(trained)
    expected = expected if done.expected is None else done.expected
    if done.exact:
        torch.testing.assert_close(done.logits, expected, rtol=1e-3, atol=1e-3)
    else:
        assert (done.logits - expected).abs().mean() < 0.2 * (expected - make.logits(base)).abs().mean()
    if done.adapter is not None:
        assert rules_broken(done.adapter, done.base) == case.then


def test_every_rule_has_an_advice_that_is_carried_out():
    tried = {}
    for rule, case in CASES:
        tried.setdefault(rule, set()).update(case.fixes)
    assert set(TABLE) - set(tried) == APART
    for name, words in tried.items():
        fix = TABLE[name].fix
        for command in re.findall(r"--(?:merged|portable|lora|base)\b", fix):
            reached = any(command in word or (command == "--base" and "base" in word) for word in words)
            assert reached, f"nobody carries out {command} of {name}"
        assert ("save_pretrained()" in fix) == any("save_pretrained()" in word for word in words), name


@pytest.mark.parametrize("init", ["pissa_niter_4", "pissa", "olora"])
def test_an_adapter_whose_base_is_lost_is_saved_in_the_converted_form(init, bases, tmp_path):
    """The advice for `base-lost`; it holds for the initialisations that need it less as well."""
    assert "path_initial_model_for_weight_conversion" in TABLE["base-lost"].fix
    settings = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": init}
    model = make.get_peft_model(make.load_base(bases["llama"]), make.LoraConfig(**settings, task_type="CAUSAL_LM"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.05 if "lora_" in name else 0))
        trained = model.eval()(input_ids=make.IDS % 63).logits
    model.save_pretrained(tmp_path / "a")
    lost = {"base-lost"} if init == "pissa_niter_4" else {"base-changed"}
    assert lost < rules_broken(tmp_path / "a", bases["llama"])
    assert load_with_peft(bases["llama"], tmp_path / "a").is_what_was_trained(trained) == (lost == {"base-changed"})
    model.save_pretrained(tmp_path / "b", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    outcome = load_with_peft(bases["llama"], tmp_path / "b")
    torch.testing.assert_close(outcome.logits, trained, rtol=1e-3, atol=1e-3)
    assert rules_broken(tmp_path / "b", bases["llama"]) == set()


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_new_tokens_are_saved_with_the_adapter_and_merged(family, bases, tmp_path, caplog):
    """The advice for `new-tokens`."""
    base = make.load_base(bases[family])
    base.resize_token_embeddings(70)
    settings = {"r": 16, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    model = make.get_peft_model(base, make.LoraConfig(**settings, task_type="CAUSAL_LM")).eval()
    ids = torch.arange(50, 70)[None]
    with torch.no_grad():
        trained = model(input_ids=ids).logits
    for folder, embeddings in (("a", False), ("b", True)):
        model.save_pretrained(tmp_path / folder, save_embedding_layers=embeddings)
        make.save_tokenizer(tmp_path / folder, 70)
    assert "save_embedding_layers=True" in TABLE["new-tokens"].fix
    assert rules_broken(tmp_path / "a", bases[family]) == {"new-tokens"}
    assert rules_broken(tmp_path / "b", bases[family]) == {"base-weights"}
    for folder in "ab":
        export_merged(tmp_path / folder, tmp_path / f"{folder}m", bases[family], dtype="float32")
        merged = make.load_base(tmp_path / f"{folder}m")
        assert merged.get_input_embeddings().num_embeddings == 70
        with torch.no_grad():
            difference = (merged(input_ids=ids).logits - trained).abs().max()
        assert (difference < 1e-4) == (folder == "b")
    assert "6 tokens" in caplog.text and "save_embedding_layers=True" in caplog.text
