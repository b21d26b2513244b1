"""What `echo-trainer check` has to say of adapters of every kind; `tests/serve` asks a real engine about the same."""

import adapter_cases as make
import torch
from adapter_cases import ALL, add, config, drop, rename, reshape, value
from peft import AdaLoraConfig, IA3Config, PromptTuningConfig
from peft.tuners.lora.config import BdLoraConfig, KasaConfig

SIGNS = {"serves": "✓", "refuses": "✗", "silently-wrong": "∅", "unknown": "?"}
Q0 = "model.layers.0.self_attn.q_proj"
GOOD = "✓ ✓ ✓ ✓ ✓"
WIDE = torch.ones(3)
INF = float("inf")
Q_AND_V = ["q_proj.weight", "v_proj.weight"]
BLOCKS = BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=2)
IA3 = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
ADALORA = AdaLoraConfig(target_modules=["q_proj", "v_proj"], total_step=10)
PROMPT = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")

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
    "lora bias": ("✗ ∅ ∅ ∅ ✗", "lora-bias", {"lora_bias": True}, None),
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
    "pissa": ("✗ ∅ ∅ ∅ ∅", "base-changed", {"init_lora_weights": "pissa"}, None),
    "olora": ("✗ ∅ ∅ ∅ ∅", "base-changed", {"init_lora_weights": "olora"}, None),
    "pissa by chance": ("✗ ∅ ∅ ∅ ∅", "base-lost", {"init_lora_weights": "pissa_niter_4"}, None),
    "corda": ("✗ ∅ ∅ ∅ ∅", "base-lost", {}, config(init_lora_weights="corda")),
    "loftq": ("✗ ∅ ∅ ∅ ∅", "base-changed", {}, config(init_lora_weights="loftq")),
    "trained tokens": ("✗ ∅ ∅ ∅ ✗", "trainable-tokens", {"trainable_token_indices": [1, 2]}, None),
    "layer replication": ("✗ ? ? ? ?", "layer-replication", {"layer_replication": [[0, 2], [1, 3]]}, None),
    "activated lora": ("✗ ? ? ? ?", "activated-lora", {"alora_invocation_tokens": [1]}, None),
    "block-diagonal": ("✗ ? ? ? ?", "variant", {"use_bdlora": BLOCKS, "target_modules": ["q_proj", "v_proj"]}, None),
    "kasa": ("? ? ? ? ?", "other-variant", {"kasa_config": KasaConfig(), "target_modules": ALL[3:]}, None),
    "a layer's parameter": ("? ? ? ? ?", "other-variant", {"target_modules": [], "target_parameters": Q_AND_V}, None),
    "all-linear as text": (GOOD, None, {}, config(target_modules="all-linear")),
    "All-Linear as text": ("✓ ✓ ✓ ✗ ✓", "regex-targets", {}, config(target_modules="All-Linear")),
    "saved embedding": ("✗ ∅ ∅ ? ✗", "base-weights", {"save_embedding_layers": True}, None),
    # disagreements
    "config rank too small": ("∅ ∅ ∅ ? ∅", "rank-disagrees", {"r": 32}, config(r=16)),
    "config rank too large": ("∅ ∅ ∅ ? ∅", "rank-disagrees", {}, config(r=32)),
    "narrow A": ("∅ ? ? ? ✗", "shape-disagrees", {}, reshape(f"{Q0}.lora_A", lambda t: t[:, :20])),
    "short B": ("∅ ? ? ? ✗", "shape-disagrees", {}, reshape(f"{Q0}.lora_B", lambda t: t[:20])),
    "another base's widths": ("∅ ? ? ? ✗", "shape-disagrees", {}, reshape("down_proj.lora_A", lambda t: t[:, :40])),
    "layer that is not there": ("∅ ∅ ∅ ? ✗", "unknown-module", {}, rename("layers.2.", "layers.7.")),
    "one prefix too many": ("∅ ∅ ∅ ? ✗", "unknown-module", {}, rename("model.model.", "model.model.model.")),
    "module that is not there": ("✗ ∅ ∅ ? ✗", "unknown-kind", {}, rename("up_proj", "wide_proj")),
    "adapter name left in": ("✗ ∅ ∅ ? ✗", "adapter-name", {}, rename(".weight", ".default.weight")),
    "another name left in": ("✗ ∅ ∅ ? ✗", "key-suffix", {}, rename(".weight", ".mine.weight")),
    "no prefix": ("✓ ∅ ∅ ? ✓", "key-prefix", {}, rename("base_model.model.", "")),
    "echo tensors": ("✗ ∅ ∅ ? ✗", "foreign-tensor", {}, add(base_model__echo__p2__weight=WIDE)),
    "plain weight": ("✗ ∅ ∅ ? ✗", "foreign-tensor", {}, add(base_model__model__model__x__weight=WIDE)),
    "bias of no layer": ("✗ ∅ ∅ ? ✗", "foreign-tensor", {}, add(base_model__model__model__norm__bias=WIDE)),
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
    "alpha left out": ("✗ ∅ ∅ ✗ ?", "alpha-missing", {}, config(lora_alpha=...)),
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
    "lora called IA3": ("∅ ? ? ✗ ∅", "mislabelled", {}, config(peft_type="IA3")),
    "lora in small letters": ("∅ ? ? ✗ ∅", "mislabelled", {}, config(peft_type="lora")),
    "and a saved module": ("∅ ? ? ✗ ∅", "mislabelled", {"modules_to_save": ["lm_head"]}, config(peft_type="lora")),
    "a method of nobody": ("∅ ? ? ✗ ∅", "mislabelled", {"trainable_token_indices": [1]}, config(peft_type="LORE")),
    "IA3": ("✗ ∅ ∅ ✗ ✗", "not-lora", {}, make.other_method(IA3)),
    "AdaLoRA": ("✗ ∅ ∅ ✗ ✗", "not-lora", {}, make.other_method(ADALORA)),
    "prompt tuning": ("✗ ∅ ∅ ✗ ✗", "not-mergeable", {}, make.other_method(PROMPT)),
}  # fmt: skip
QV, UP, OLD = ["q_proj", "v_proj"], make.EXPERTS[:1], {"target_modules": ["w1", "w2", "w3"]}
LANGUAGE = r".*language_model.*[qv]_proj"
BOTH = {"target_modules": [], "target_parameters": make.EXPERTS}
OTHERS = {  # on other bases
    "qwen2": ("qwen2", GOOD, None, {}),
    "qwen2, trained biases": ("qwen2", "✗ ∅ ∅ ∅ ✗", "bias", {"bias": "lora_only"}),
    "qwen2, trained lora biases": ("qwen2", "✗ ∅ ∅ ∅ ✗", "bias", {"lora_bias": True, "target_modules": QV}),
    "head of a tied base": ("llama-tied", "? ∅ ? ? ✗", "tied-head", {"target_modules": [*ALL, "lm_head"]}),
    "gpt2": ("gpt2", "✗ ∅ ? ? ✓", "family", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "experts kept apart in vLLM": ("qwen3_moe", "✗ ∅ ? ✗ ?", "experts-refused", BOTH),
    "experts and attention": ("qwen3_moe", "✗ ∅ ? ✗ ?", "experts-refused", {**BOTH, "target_modules": QV}),
    "experts fused in vLLM": ("gpt_oss", "✓ ∅ ? ✗ ?", "experts", BOTH),
    "one expert parameter": ("gpt_oss", "✗ ∅ ? ✗ ?", "experts-refused", {**BOTH, "target_parameters": UP}),
    "experts that vLLM calls otherwise": ("mixtral", "∅ ∅ ? ✗ ?", "experts-left-out", BOTH),
    "experts by the names of before": ("mixtral", "∅ ∅ ? ✗ ?", "experts-left-out", OLD),
    "vision tower": ("llava", "∅ ∅ ? ∅ ?", "tower", {"target_modules": QV}),
    "language model of a vision model": ("llava", "✓ ✓ ✓ ✗ ✓", "regex-targets", {"target_modules": LANGUAGE}),
}  # fmt: skip
