"""Adapters behind a real vLLM, over the OpenAI API, against PEFT in float32: every token, every log-probability.

Also the verdicts of `check_adapter` for vLLM against what vLLM does, for the whole table of good and broken adapters.
Needs the environment that make_env.sh makes, and VLLM_PYTHON set to its interpreter.
"""

import os
import shutil

import adapter_cases as make
import pytest
import torch
from peft import LoraConfig, get_peft_model
from serving_cases import LLAMA
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vllm_server import complete_with, load_peft, serve

from echo_trainer.adapter.check import check_adapter
from echo_trainer.adapter.portable import make_portable
from echo_trainer.export.forms import export_merged

pytestmark = pytest.mark.skipif(not os.environ.get("VLLM_PYTHON"), reason="set VLLM_PYTHON (see make_env.sh)")

LENGTH = 24
PROMPTS = [[3, 9, 27, 17, 51], [60, 1, 2, 3, 5, 8, 13, 21, 34, 55], [40]]
TARGETS = ["q_proj", "v_proj", "down_proj"]
TRAINED = {
    "lora": {"r": 16, "target_modules": make.ALL},
    "rslora": {"r": 16, "use_rslora": True, "target_modules": make.ALL},
    "layers": {"r": 16, "layers_to_transform": [1], "target_modules": TARGETS},
    "odd": {"r": 12, "lora_alpha": 20, "target_modules": TARGETS},
    "patterns": {"r": 8, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}, "target_modules": TARGETS},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random model with heads of 32, the smallest that vLLM's CPU attention takes, and a tokenizer."""
    return save_words(make.save_base("llama-served", tmp_path_factory.mktemp("base")))


def save_words(folder):
    """Save a tokenizer of 64 words beside the model."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1").save_pretrained(folder)
    return folder


def train(base, folder, **settings):
    """Teach the model a fixed sequence of tokens for each prompt's first token, with PEFT alone."""
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", **{"lora_alpha": 32, **settings})
    model = get_peft_model(make.load_base(base), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    ids = torch.randint(0, 64, (8, 32))
    for _ in range(30):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def compare(server, name, base, adapter, prompts=PROMPTS):
    """Assert equal tokens and log-probabilities; returns the tokens."""
    completions, model = [], load_peft(base, adapter)
    for prompt in prompts:
        tokens, scores = server.complete(name, prompt, LENGTH)
        expected_tokens, expected_scores = complete_with(model, prompt, LENGTH)
        assert tokens == expected_tokens
        difference = max(abs(a - b) for a, b in zip(scores, expected_scores, strict=True))
        print(f"{name}: {len(tokens)} tokens equal, log-probabilities within {difference:.1e}")
        assert difference < 1e-4
        completions += tokens
    return completions


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    found = {}
    for name, settings in TRAINED.items():
        found[name] = train(base, folder / name, **settings)
        found[f"{name}-portable"] = make_portable(found[name], base, folder / f"{name}-portable")
    return found


@pytest.fixture(scope="module")
def server(base, adapters, tmp_path_factory):
    modules = [f"{name}={path}" for name, path in adapters.items()]
    options = ["--enable-lora", "--max-lora-rank", "512", "--lora-modules", *modules]
    with serve(base, tmp_path_factory.mktemp("log") / "vllm.log", *options) as running:
        yield running


def test_base_alone(server, base):
    compare(server, "base", base, None)


@pytest.mark.parametrize("form", ["", "-portable"])
@pytest.mark.parametrize("name", TRAINED)
def test_adapter_as_peft_computes_it(name, form, server, base, adapters):
    tokens = compare(server, name + form, base, adapters[name])  # the portable form against the trained one
    assert tokens != [token for prompt in PROMPTS for token in server.complete("base", prompt, LENGTH)[0]]


def test_merged_dora(base, tmp_path):
    dora = train(base, tmp_path / "dora", r=8, use_dora=True, target_modules=TARGETS)
    export_merged(dora, tmp_path / "merged", base, dtype="float32")
    with serve(tmp_path / "merged", tmp_path / "log") as running:
        tokens = compare(running, "base", base, dora)
    plain = load_peft(base, None)
    assert tokens != [token for prompt in PROMPTS for token in complete_with(plain, prompt, LENGTH)[0]]


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name, case in LLAMA.items() if case[1] != "non-finite"])
def test_verdict_is_what_vllm_does(name, server, base, tmp_path):
    """Refused where `check` says so; elsewhere loaded, and right only where it says `serves`.

    NaN and infinity are left out: they spoil the running server, which is what the rule says of them.
    """
    expected, _, settings, change = LLAMA[name]
    adapter = make.save_adapter(base, tmp_path / "adapter", **settings)
    trained = shutil.copytree(adapter, tmp_path / "trained")
    if change is not None:
        change(adapter)
    verdict = check_adapter(adapter, engine="vllm", base=base).verdicts["vllm"]
    assert {"✓": "serves", "✗": "refuses", "∅": "silently-wrong", "?": "unknown"}[expected.split()[0]] == verdict
    refused = server.load(f"case {name}", adapter)
    if verdict == "unknown":
        return
    assert (refused is not None) == (verdict == "refuses"), refused
    if verdict == "serves":
        compare(server, f"case {name}", base, trained, PROMPTS[:1])
