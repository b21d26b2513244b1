"""For every rule of `adapter.rules`: an adapter that breaks it, and what its fix says, carried out."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import adapter_cases as make
import torch
from adapter_cases import ALL, EXPERTS, config, drop, rename, reshape, value
from peft import AdaLoraConfig, IA3Config, PeftModel, PromptTuningConfig
from peft.tuners.lora.config import BdLoraConfig
from peft_outcome import load_with_peft
from serving_cases import Q0, WIDE

from echo_trainer.adapter.check import check_adapter
from echo_trainer.export.forms import export_lora, export_merged, export_portable


@dataclass
class Broken:
    """An adapter that breaks a rule: where it and its base are, and the adapter before its files were changed."""

    base: Path
    adapter: Path
    trained: Path
    out: Path


@dataclass
class Done:
    """
    What an advice leads to: logits, and the adapter to be looked at again (None: it is none any more).

    `expected` are the logits to be had, where they are not those of the broken adapter's training.
    """

    logits: torch.Tensor
    adapter: Path | None = None
    base: Path | None = None
    exact: bool = True
    expected: torch.Tensor | None = None


Advice = Callable[[Broken], Done]


@dataclass
class Case:
    """
    Attributes:
        fixes: words of the rule's fix -> what they say, carried out. All of them must lead to a sound adapter.
        family, settings, change: the adapter: its base, what it was trained with, what was done to its files.
        then: rules that are left afterwards, for which the next advice is another case.
        seen_with: the base that it is looked at with first, where it is another one; "" for none.
    """

    fixes: dict[str, Advice]
    settings: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Path], None] | None = None
    family: str = "llama"
    then: set[str] = field(default_factory=set)
    seen_with: str | None = None


def merged(broken: Broken) -> Done:
    export_merged(broken.adapter, broken.out, broken.base, dtype="float32")
    with torch.no_grad():
        return Done(make.load_base(broken.out)(input_ids=make.IDS % 63).logits)


def portable(broken: Broken) -> Done:
    export_portable(broken.adapter, broken.out, broken.base)
    return _loaded(broken, broken.out)


def fitted(broken: Broken) -> Done:
    export_lora(broken.adapter, broken.out, broken.base, rank=32)
    done = _loaded(broken, broken.out)
    return Done(done.logits, done.adapter, done.base, exact=False)


def again(broken: Broken) -> Done:
    """Save it once more from the model in memory; here that is the one in the files before they were changed."""
    model = PeftModel.from_pretrained(make.load_base(broken.base), broken.trained)
    for path in broken.adapter.iterdir():
        path.unlink()
    model.save_pretrained(broken.adapter)
    return _loaded(broken)


def copied_again(broken: Broken) -> Done:
    shutil.copytree(broken.trained, broken.adapter, dirs_exist_ok=True)
    return _loaded(broken)


def corrected(**changes: Any) -> Advice:
    def advice(broken: Broken) -> Done:
        make.edit_config(broken.adapter, **changes)
        return _loaded(broken)

    return advice


def changed(change: Callable[[Path], None]) -> Advice:
    def advice(broken: Broken) -> Done:
        change(broken.adapter)
        return _loaded(broken)

    return advice


def first_then(first: Advice, then: Advice) -> Advice:
    def advice(broken: Broken) -> Done:
        first(broken)
        return then(broken)

    return advice


def other_base(family: str) -> Advice:
    """Look at the adapter with the base that it was trained on; its config names another one."""

    def advice(broken: Broken) -> Done:
        base = broken.base.with_name(family)
        return Done(load_with_peft(base, broken.adapter).logits, broken.adapter, base)

    return advice


def with_peft(broken: Broken) -> Done:
    """Transformers and PEFT serve it as it is, and what engines do with it is still said."""
    return Done(load_with_peft(broken.base, broken.adapter).logits)


def trained_anew(**settings: Any) -> Advice:
    """Train it without what no engine serves: another adapter, which is its own measure."""

    def advice(broken: Broken) -> Done:
        adapter = make.save_adapter(broken.base, broken.out, **settings)
        done = _loaded(broken, adapter)
        return Done(done.logits, done.adapter, done.base, expected=make.trained_logits(adapter))

    return advice


def _loaded(broken: Broken, adapter: Path | None = None) -> Done:
    adapter = adapter or broken.adapter
    outcome = load_with_peft(broken.base, adapter)
    assert outcome.how == "whole", outcome.why
    return Done(outcome.logits, adapter, broken.base)


def rules_broken(adapter: Path, base: Path) -> set[str]:
    return {found.rule.name for found in check_adapter(adapter, base=base).findings}


def without(keys: str) -> Callable[[Path], None]:
    return drop(keys)


MERGED, PORTABLE, AGAIN, PEFT = "--merged", "--portable", "save_pretrained()", "with transformers and PEFT"
BASE = "Give the base"
HALF = {"target_modules": ["q_proj", "k_proj", "v_proj"]}
NOBODY = config(base_model_name_or_path="nobody/nothing")
MOVED, BASE_MOVED = make.remove("adapter_model_old.safetensors"), make.remove("model.safetensors")
BLOCKS = BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=2)
IA3 = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
ADALORA = AdaLoraConfig(target_modules=["q_proj", "v_proj"], total_step=10)
PROMPT = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
BOTH = {"target_modules": [], "target_parameters": EXPERTS}
B0 = f"base_model.model.{Q0}.lora_B.weight"

CASES: list[tuple[str, Case]] = [
    # files
    ("no-config", Case({AGAIN: again}, change=make.remove("adapter_config.json"))),
    ("broken-config", Case({AGAIN: again}, change=make.write("adapter_config.json", '{"r": 16,'))),
    ("bad-setting", Case({"Correct it": corrected(rank_pattern={})}, change=config(rank_pattern=[1]))),
    ("no-weights", Case({AGAIN: again}, change=make.remove(make.WEIGHTS))),
    ("broken-weights", Case({"Copy it again": copied_again, AGAIN: again}, change=make.cut)),
    ("lfs-pointer", Case({"git lfs pull": copied_again}, change=make.to_lfs_pointer)),
    ("pickle", Case({AGAIN: again}, change=make.to_true_pickle)),
    ("second-adapter-file", Case({"Move the other file": changed(MOVED)}, change=make.copy_weights)),
    ("other-safetensors", Case({"Move the other": changed(BASE_MOVED)}, change=make.foreign_file)),
    # settings
    ("not-lora", Case({MERGED: merged}, change=make.other_method(IA3))),
    ("not-lora", Case({MERGED: merged}, change=make.other_method(ADALORA))),
    ("not-mergeable", Case({PEFT: with_peft}, change=make.other_method(PROMPT))),
    ("mislabelled", Case({"Correct peft_type": corrected(peft_type="LORA")}, change=config(peft_type="IA3"))),
    ("missing-setting", Case({"Write them": corrected(r=16), AGAIN: again}, change=config(r=...))),
    ("alpha-missing", Case({"Write the lora_alpha": corrected(lora_alpha=32)}, change=config(lora_alpha=...))),
    ("bad-number", Case({"positive integers": corrected(r=16), AGAIN: again}, change=config(r=0))),
    ("bad-number", Case({"finite numbers": corrected(lora_alpha=32), AGAIN: again}, change=config(lora_alpha="32"))),
    ("no-lora-tensors", Case({AGAIN: again}, change=drop(""))),
    # not B A
    ("dora", Case({MERGED: merged, "--lora": fitted}, {"use_dora": True, "target_modules": ["q_proj", "o_proj"]})),
    ("magnitudes-without-flag", Case(
        {"then merge it": first_then(corrected(use_dora=True), merged)}, {"use_dora": True}, config(use_dora=False))),
    ("magnitudes-missing", Case({"use_dora to false": corrected(use_dora=False), AGAIN: again}, {},
                                config(use_dora=True))),
    ("saved-modules", Case({MERGED: merged}, {"modules_to_save": ["lm_head"]})),
    ("saved-modules", Case({MERGED: merged}, {"modules_to_save": ["norm", "lm_head"]}, family="llama-tied")),
    ("trainable-tokens", Case({MERGED: merged}, {"trainable_token_indices": [1, 2]})),
    ("trainable-tokens", Case({MERGED: merged}, {"trainable_token_indices": [1, 2]}, family="llama-tied")),
    ("base-weights", Case({MERGED: merged}, {"save_embedding_layers": True})),
    ("bias-setting", Case({PORTABLE: portable}, {"bias": "all"})),
    ("bias", Case({MERGED: merged}, {"bias": "lora_only"}, family="qwen2")),
    ("bias", Case({MERGED: merged}, {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}, family="qwen2")),
    ("lora-bias", Case({PEFT: with_peft, "lora_bias=False": trained_anew()}, {"lora_bias": True})),
    ("base-changed", Case({MERGED: merged}, {"init_lora_weights": "pissa"})),
    ("base-changed", Case({MERGED: merged}, {"init_lora_weights": "olora"})),
    ("layer-replication", Case({MERGED: merged}, {"layer_replication": [[0, 2], [1, 3]]})),
    ("layer-replication", Case({MERGED: merged}, {"layer_replication": [[0, 1], [0, 1]]}, family="qwen2")),
    ("layer-replication", Case({MERGED: merged}, {"layer_replication": [[0, 3], [0, 3]]}, family="llama-tied")),
    ("activated-lora", Case({PEFT: with_peft}, {"alora_invocation_tokens": [7, 14]})),
    ("variant", Case({MERGED: merged}, {"use_bdlora": BLOCKS, "target_modules": ["q_proj", "v_proj"]})),
    ("other-variant", Case({MERGED: merged}, {"target_modules": [], "target_parameters": ["q_proj.weight"]})),
    # experts and towers
    ("experts", Case({MERGED: merged}, BOTH, family="gpt_oss")),
    ("experts-refused", Case({MERGED: merged}, BOTH, family="qwen3_moe")),
    ("experts-refused", Case({MERGED: merged}, {**BOTH, "target_parameters": EXPERTS[1:]}, family="gpt_oss")),
    ("experts-left-out", Case({MERGED: merged}, BOTH, family="mixtral")),
    ("experts-unknown", Case({BASE: other_base("gpt_oss")}, BOTH, NOBODY, "gpt_oss", {"experts"}, "")),
    ("tower", Case({MERGED: merged}, {"target_modules": ["q_proj", "v_proj"]}, family="llava")),
    ("tower", Case({MERGED: merged}, {"target_modules": ["linear_1", "linear_2"]}, family="llava")),
    # scales, ranks, modules
    ("rslora", Case({PORTABLE: portable}, {"use_rslora": True})),
    ("alpha-pattern", Case({PORTABLE: portable}, {"alpha_pattern": {"q_proj": 8}})),
    ("mixed-ranks", Case({PORTABLE: portable}, {"rank_pattern": {"layers.1.mlp.up_proj": 32}})),
    ("rank-pattern", Case({PORTABLE: portable}, {"rank_pattern": {"up_proj": 32}})),
    ("rank-block", Case({PORTABLE: portable}, {"r": 12})),
    ("rank-too-large", Case({MERGED: merged}, {"r": 528})),
    ("untrained-layers", Case({PORTABLE: portable}, {"layers_to_transform": [0, 2]})),
    ("depth-unknown", Case({BASE: other_base("llama")}, change=NOBODY, seen_with="")),
    ("regex-targets", Case({PORTABLE: portable}, {"target_modules": r".*\.(q|k|v)_proj"})),
    ("q-without-v", Case({PORTABLE: portable}, {"target_modules": ["q_proj", "o_proj"]})),
    ("embedding", Case({"Train without": trained_anew(), MERGED: merged}, {"target_modules": [*ALL, "lm_head"]})),
    ("embedding", Case({"Train without": trained_anew(), MERGED: merged}, {"target_modules": [*ALL, "embed_tokens"]})),
    ("tied-head", Case({MERGED: merged}, {"target_modules": [*ALL, "lm_head"]}, family="llama-tied")),
    ("module-type", Case({"Train on those": trained_anew(target_modules=["o_proj", "down_proj"]), MERGED: merged},
                         {"target_modules": ["qkv_proj", "o_proj"]}, family="phi3")),
    ("family", Case({MERGED: merged}, {"target_modules": ["c_attn"], "fan_in_fan_out": True}, family="gpt2")),
    # tensors
    ("unknown-kind", Case({"remove the tensors": changed(without("wide_proj"))}, HALF,
                          make.add(**{f"base_model__model__model__layers__0__mlp__wide_proj__lora_{s}__weight": t
                                      for s, t in (("A", torch.ones(16, 32)), ("B", torch.ones(48, 16)))}))),
    ("unknown-kind", Case({BASE: other_base("gpt2")}, {"target_modules": ["c_attn"], "fan_in_fan_out": True},
                          family="gpt2", then={"family", "module-type"}, seen_with="llama")),
    ("unknown-module", Case({"correct the tensor names": changed(rename("layers.7.", "layers.2."))}, {},
                            rename("layers.2.", "layers.7."))),
    ("rank-disagrees", Case({"Correct r": corrected(r=16)}, {}, config(r=32))),
    ("rank-disagrees", Case({"rank_pattern": first_then(corrected(rank_pattern={"q_proj": 32}), portable)},
                            {"rank_pattern": {"q_proj": 32}}, config(rank_pattern={}))),
    ("shape-disagrees", Case({AGAIN: again}, {}, reshape(f"{Q0}.lora_A", lambda t: t[:, :20]))),
    ("key-prefix", Case({AGAIN: again}, {}, rename("base_model.model.", ""))),
    ("key-suffix", Case({AGAIN: again}, {}, rename(".weight", ".mine.weight"))),
    ("adapter-name", Case({PORTABLE: portable}, {}, rename(".weight", ".default.weight"))),
    ("foreign-tensor", Case({"Remove them": changed(without("echo"))}, {}, make.add(base_model__echo__weight=WIDE))),
    ("b-missing", Case({AGAIN: again}, {}, drop(f"{Q0}.lora_B"))),
    ("a-missing", Case({AGAIN: again}, {}, drop(f"{Q0}.lora_A"))),
    ("not-a-matrix", Case({AGAIN: again}, {}, reshape(f"{Q0}.lora_A", lambda t: torch.empty(0)))),
    ("not-floating", Case({PORTABLE: portable}, {}, reshape(f"{Q0}.lora_A", lambda t: t.to(torch.float8_e4m3fn)))),
    ("outside-targets", Case({"Correct target_modules": corrected(target_modules=ALL)}, {},
                             config(target_modules=ALL[:-1]))),
    ("non-finite", Case({"earlier checkpoint": copied_again}, {}, value(f"{Q0}.lora_B.weight", float("nan")))),
    ("peft-refuses", Case({AGAIN: again}, {"modules_to_save": ["lm_head"]}, drop("lm_head"), then={"saved-modules"})),
]  # fmt: skip
