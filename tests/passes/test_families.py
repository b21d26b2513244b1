"""Every causal family of transformers: the pass that the proof chooses has the loss and gradients of the full pass.

`python tests/support/make_families.py` writes what these tests find into `docs/families.md`. The families that users
ask for most are tried in every run; all others, and other layouts, in a long one
(`pytest -m long tests/passes/test_families.py`).
"""

import pytest
from families import causal_families
from family_cases import LAYOUTS, NotTriedError, try_computing_again, try_family
from make_families import known_outcome, read

from echo_trainer.passes.echo import RECOMPUTED, SUFFIX

ASKED_FOR = [
    "llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3_text", "gpt2", "opt", "gpt_neox", "olmo2",
    "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu",
    "llama4_text", "glm4", "cohere", "cohere2", "granite", "smollm3", "starcoder2", "phi", "gemma", "gemma3n_text",
    "gptj", "bloom", "falcon", "mpt", "bitnet", "minicpm3", "lfm2", "falcon_h1", "jamba", "mamba2", "bamba",
    "qwen3_next", "olmo3", "recurrent_gemma", "openai-gpt", "afmoe", "biogpt", "xglm", "bert", "llava", "gemma3",
    "qwen2_vl",
]  # fmt: skip
OTHERS = [family for family in causal_families() if family not in ASKED_FOR]

CASES = [
    *((family, layout) for family in ASKED_FOR for layout in ("padded", "packed")),
    *(pytest.param(family, "padding-free", marks=pytest.mark.long) for family in ASKED_FOR),
    *(pytest.param(family, layout, marks=pytest.mark.long) for family in OTHERS for layout in LAYOUTS),
]


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_family(family, layout):
    try:
        outcome = try_family(family, layout)
    except NotTriedError as error:
        assert family not in ASKED_FOR
        pytest.skip(str(error))
    known = known_outcome(family, layout)
    assert known in (None, outcome.form), f"docs/families.md says {known!r}; make_families.py {family}"
    assert family not in ASKED_FOR or read()[family].get(layout), f"not in docs/families.md: make_families.py {family}"


AGAIN = ["llama", "qwen3", "gemma3_text", "gpt2", "gpt_oss", "deepseek_v3"]


@pytest.mark.parametrize(
    "family", [*AGAIN, *(pytest.param(f, marks=pytest.mark.long) for f in causal_families() if f not in AGAIN)]
)
def test_family_computed_again(family):
    """With `echo_memory="recompute"` a family that runs suffixes has the same gradients, or says why it keeps them."""
    if known_outcome(family, "packed") != SUFFIX.name:
        pytest.skip("no pass over suffixes")
    for outcome in try_computing_again(family, "packed"):
        if outcome.form != RECOMPUTED.name:
            assert family not in AGAIN and outcome.why.startswith(f"{RECOMPUTED}: "), outcome
