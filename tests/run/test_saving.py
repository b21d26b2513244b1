"""Invariant 7: what is saved is an ordinary PEFT adapter, and nothing that should stay private."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from models import DEPTH, lora_config, prompt_completion_rows, tiny_model, tiny_tokenizer
from peft import PeftModel
from safetensors.torch import load_file
from training import SETTINGS, adapter, echo_trainer, revive

import echo_trainer.adapter.folder as folder_module
import echo_trainer.adapter.read as read_module
from echo_trainer import EchoSFTConfig, EchoSFTTrainer

DORA = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
FINAL_FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "assets",
    "chat_template.jinja",
    "echo_run.json",
    "tokenizer.json",
    "tokenizer_config.json",
}

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# Loads the adapter in a process that cannot import echo_trainer, and prints the logits of one prompt.
LOADER = """
import sys
sys.modules["echo_trainer"] = None  # an import of it would fail
sys.path.remove("") if "" in sys.path else None
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(2, 20)[None]).logits, out)
"""


def plain_logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 20)[None]).logits


@DORA
@pytest.mark.parametrize("portable", [True, False], ids=["portable", "as-trained"])
def test_saved_adapter_is_an_ordinary_one(tmp_path, dora, portable):
    base, out = tmp_path / "base", tmp_path / "out"
    tiny_model().save_pretrained(base)
    lora = lora_config(use_dora=dora, init_lora_weights=True)
    trainer = echo_trainer(out, lora=lora, echo_p_end=1.0, portable_adapter=portable)
    revive(trainer)
    trainer.train()
    trainer.save_model()

    assert set(os.listdir(out)) == FINAL_FILES
    assert (out / "adapter_model.safetensors").stat().st_mode == (out / "README.md").stat().st_mode
    tensors = load_file(out / "adapter_model.safetensors")
    assert tensors and all("lora_" in name for name in tensors)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and not any("echo" in key for key in config)

    logits = tmp_path / "logits.pt"
    subprocess.run([sys.executable, "-c", LOADER, base, out, logits], check=True, cwd=tmp_path)
    if portable and not dora:  # the rank is padded from 4 to 16, so sums are rounded elsewhere
        assert config["r"] == 16
        torch.testing.assert_close(torch.load(logits), plain_logits(trainer.model), rtol=1e-5, atol=1e-6)
    else:
        assert config["r"] == 4
        assert torch.equal(torch.load(logits), plain_logits(trainer.model))


def test_the_saved_adapter_is_trained_on(tmp_path):
    """The portable form holds ranks and modules that were not trained; all of them learn in the next run."""
    first = echo_trainer(
        tmp_path / "sft", max_steps=2, lora=lora_config(target_modules=LINEAR, layers_to_transform=[0, 1])
    )
    first.train()
    first.save_model()
    saved = load_file(tmp_path / "sft" / "adapter_model.safetensors")
    assert len(saved) == 2 * 7 * DEPTH and all(16 in value.shape for value in saved.values())
    model = PeftModel.from_pretrained(tiny_model(), tmp_path / "sft", is_trainable=True)
    second = EchoSFTTrainer(
        model=model,
        args=EchoSFTConfig(output_dir=str(tmp_path / "more"), **{**SETTINGS, "max_steps": 2, "warmup_steps": 0}),
        train_dataset=Dataset.from_list(prompt_completion_rows(40)),
        processing_class=tiny_tokenizer(),
    )
    before = adapter(second)
    second.train()
    still = [name for name, value in adapter(second).items() if torch.equal(value, before[name])]
    assert len(before) == len(saved) and not still


def test_an_adapter_is_read_once_for_every_state_of_its_files(tmp_path, monkeypatch):
    """As trained, and in the portable form; checks, card and record take the value that was read."""
    parsed, hashed = [], []
    read, digest = read_module._read_config, folder_module.sha256
    monkeypatch.setattr(read_module, "_read_config", lambda folder: parsed.append(folder) or read(folder))
    monkeypatch.setattr(folder_module, "sha256", lambda path: hashed.append(path) or digest(path))
    trainer = echo_trainer(tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model()
    assert len(parsed) == 2 and len(hashed) == 1
    saved = json.loads((tmp_path / "echo_run.json").read_text())["saved"]
    assert saved["sha256"] == digest(tmp_path / "adapter_model.safetensors")
    trainer.create_model_card()
    assert len(parsed) == 2 and len(hashed) == 1
    assert json.loads((tmp_path / "echo_run.json").read_text())["saved"] == saved


def test_no_token_in_any_file(tmp_path):
    secret = "hf_thisIsASecretTokenNobodyMaySee"
    trainer = echo_trainer(tmp_path, hub_token=secret, save_strategy="steps", save_steps=3)
    trainer.train()
    trainer.save_model()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 12
    assert not [path for path in files if secret.encode() in path.read_bytes()]
    torch.save(trainer.args, tmp_path / "arguments.bin")
    assert secret.encode() not in (tmp_path / "arguments.bin").read_bytes()
    assert trainer.args.hub_token == secret


def test_checkpoints_hold_what_a_resume_needs(tmp_path):
    trainer = echo_trainer(tmp_path, save_strategy="steps", save_steps=3)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-6"
    echo = load_file(checkpoint / "echo_networks.safetensors")
    assert echo.keys() == trainer.echo_networks.state_dict().keys()
    assert all("lora_" in name for name in load_file(checkpoint / "adapter_model.safetensors"))
    trainer.save_model()
    assert not list(tmp_path.glob("echo_networks*")) and not list(tmp_path.glob("*.bin"))


def test_save_only_model_leaves_the_echo_out_and_resume_says_so(tmp_path):
    trainer = echo_trainer(tmp_path, save_strategy="steps", save_steps=3, save_only_model=True)
    trainer.train()
    assert not (tmp_path / "checkpoint-3" / "echo_networks.safetensors").exists()
    again = echo_trainer(tmp_path)
    with pytest.raises(ValueError, match="save_only_model"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_best_model_brings_its_echo_networks(tmp_path):
    trainer = echo_trainer(
        tmp_path,
        trainer_kwargs={"eval_dataset": Dataset.from_list(prompt_completion_rows(8, seed=5))},
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_entropy",
        greater_is_better=True,
        learning_rate=5e-2,
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    saved = load_file(best / "echo_networks.safetensors")
    for name, value in trainer.echo_networks.state_dict().items():
        assert torch.equal(value, saved[name])
    weights = load_file(best / "adapter_model.safetensors")
    for name, value in adapter(trainer).items():
        assert torch.equal(value, weights[name.replace(".default", "")])


def test_card_and_record(tmp_path):
    trainer = echo_trainer(tmp_path)
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")
    assert str(tmp_path) not in card and "None" not in card and "{{" not in card
    record = json.loads((tmp_path / "echo_run.json").read_text())
    assert record["echo"]["source_layers"] == [4] and record["echo"]["target_layers"] == [1]
    assert record["steps"]["done"] == 6 and record["echo"]["pass"] == "suffix"
    assert str(tmp_path) not in json.dumps(record)
    assert (tmp_path / "assets" / "training.png").read_bytes().startswith(b"\x89PNG")
