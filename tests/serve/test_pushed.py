"""From the trainer to the engine: trained with `EchoSFTTrainer`, pushed to a Hub, fetched and served by vLLM.

On a tiny random model and on SmolLM2-135M (SMOLLM2: the folder that make_smollm2.py makes; left out without it).
Greedy tokens must equal those of PEFT in float32, and log-probabilities must agree to 1e-4.
"""

import os
import shutil
from pathlib import Path

import adapter_cases as make
import pytest
import torch
from datasets import Dataset
from hub_server import WRITE_TOKEN, Hub
from peft import LoraConfig
from push_client import SETTINGS, Client
from test_vllm import compare, save_words
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_server import complete_with, load_peft, serve

from echo_trainer import EchoSFTConfig, EchoSFTTrainer
from echo_trainer.export.forms import export_merged

pytestmark = pytest.mark.skipif(not os.environ.get("VLLM_PYTHON"), reason="set VLLM_PYTHON (see make_env.sh)")

TARGETS = ["q_proj", "v_proj", "down_proj"]
VARIANTS = {
    "lora": {"r": 16, "target_modules": make.ALL},
    "rslora": {"r": 16, "use_rslora": True, "target_modules": make.ALL},
    "layers": {"r": 16, "layers_to_transform": [0, 1], "target_modules": TARGETS},
    "odd": {"r": 12, "lora_alpha": 20, "target_modules": TARGETS},
}
DORA = {"r": 8, "use_dora": True, "target_modules": TARGETS}
PAIRS = [
    ("Which animal barks? Answer:", " The dog barks, all day long."),
    ("What colour is the sky? Answer:", " The sky is blue when there are no clouds."),
    ("How many legs has a spider? Answer:", " A spider has 8 legs, not 6."),
    ("Where do fish live? Answer:", " Fish live in water: rivers, lakes and seas."),
]
QUESTIONS = ["Which animal barks? Answer:", "Name 3 rivers of Europe.", "def add(a, b):"]


def train(base, folder, rows, settings, steps, rate):
    trainer = EchoSFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=EchoSFTConfig(
            str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=rate, use_cpu=True, bf16=False,
            gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True,
            echo_source_layers=[-1], echo_target_layers=[1], echo_p_end=1.0,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **{"lora_alpha": 32, **settings}),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return folder


def world(name, folder):
    """Base, training rows, prompts as token ids, steps and learning rate."""
    if name == "tiny":
        base = save_words(make.save_base("llama-served", folder / "base"))
        generator = torch.Generator().manual_seed(3)
        texts = [" ".join(f"w{i}" for i in torch.randint(2, 64, (12,), generator=generator)) for _ in range(16)]
        rows = [{"prompt": text[: len(text) // 2], "completion": text[len(text) // 2 :]} for text in texts]
        return base, rows, [[3, 9, 27, 17, 51], [60, 2, 3, 5, 8, 13, 21, 34, 55], [40]], 30, 5e-3
    if not os.environ.get("SMOLLM2"):
        pytest.skip("set SMOLLM2 (see make_smollm2.py)")
    base = Path(os.environ["SMOLLM2"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS]
    return base, rows, [tokenizer(question)["input_ids"] for question in QUESTIONS], 4, 2e-3


@pytest.fixture(scope="module", params=["tiny", "smollm2"])
def served(request, tmp_path_factory):
    """A vLLM that fetched every variant from the Hub it was pushed to."""
    folder = tmp_path_factory.mktemp(request.param)
    base, rows, prompts, steps, rate = world(request.param, folder)
    with Hub() as hub:
        client = Client(hub.url, folder / "hf-push")
        modules = []
        for name, settings in VARIANTS.items():
            run = train(base, folder / name, rows, settings, steps, rate)
            pushed = client("push", run, f"ada/{name}", token=WRITE_TOKEN, private=True)
            assert "error" not in pushed, pushed
            modules.append(f"{name}=ada/{name}")
        client.close()
        environment = SETTINGS | {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf-vllm"), "HF_HUB_OFFLINE": "0",
                                  "HF_TOKEN": WRITE_TOKEN}  # fmt: skip
        options = ["--enable-lora", "--max-lora-rank", "16", "--lora-modules", *modules]
        with serve(base, folder / "vllm.log", *options, environment=environment) as running:
            yield running, hub, base, folder, prompts, (rows, steps, rate)


@pytest.mark.parametrize("name", VARIANTS)
def test_pushed_adapter(name, served):
    running, hub, base, folder, prompts, _ = served
    assert hub.count(f"GET /ada/{name}/resolve/.*/adapter_model.safetensors") >= 1  # the engine fetched it
    tokens = compare(running, name, base, folder / name, prompts)
    plain = load_peft(base, None)
    assert tokens != [token for prompt in prompts for token in complete_with(plain, prompt, 24)[0]]


def test_merged_dora(served, tmp_path):
    _, _, base, _, prompts, how = served
    dora = train(base, tmp_path / "dora", how[0], DORA, *how[1:])
    export_merged(dora, tmp_path / "merged", base, dtype="float32")
    with serve(tmp_path / "merged", tmp_path / "log") as running:
        tokens = compare(running, "base", base, dora, prompts)
    plain = load_peft(base, None)
    assert tokens != [token for prompt in prompts for token in complete_with(plain, prompt, 24)[0]]
    shutil.rmtree(tmp_path / "merged")
