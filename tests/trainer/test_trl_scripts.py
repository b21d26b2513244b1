"""
TRL's example scripts run with the import and the names of two classes changed, on tiny local models and rows.

`trl.scripts.sft` comes with TRL; the others are read from examples/scripts of a checkout, the folder that
TRL_EXAMPLES names.
"""

import inspect
import json
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from chat import byte_model, byte_tokenizer, template
from datasets import Dataset
from families import family_model
from safetensors.torch import save_file
from trl.scripts import sft
from vision import UNMARKED, image_rows, llava

CPU = ["--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--max_steps", "2", "--logging_steps", "1",
       "--save_strategy", "no", "--use_peft", "--lora_r", "4"]  # fmt: skip

EXAMPLES = Path(os.environ.get("TRL_EXAMPLES", ""))
NEEDS_EXAMPLES = pytest.mark.skipif(
    "TRL_EXAMPLES" not in os.environ, reason="set TRL_EXAMPLES to examples/scripts of a checkout of TRL"
)


def ours(script: str) -> str:
    """The script with our classes."""
    changed = re.sub(r"\bSFT(Config|Trainer)\b", r"EchoSFT\1", script)
    # Each import of TRL loses the two names.
    changed = re.sub(r"(from trl import (?:\([^)]*\)|[^\n(]*))", lambda m: _without(m.group(0)), changed)
    return "from echo_trainer import EchoSFTConfig, EchoSFTTrainer\n" + changed


def _without(statement: str) -> str:
    return re.sub(r"\bEchoSFT(Config|Trainer)\b,?\s*", "", statement).rstrip().rstrip(",")


def run(folder, monkeypatch, script, *arguments):
    """Run a script as a user would, and give the record of its run."""
    path = folder / "script.py"
    path.write_text(ours(script))
    monkeypatch.setattr(sys, "argv", ["script.py", *arguments, *CPU, "--output_dir", str(folder / "out")])
    runpy.run_path(str(path), run_name="__main__")
    return json.loads((folder / "out" / "echo_run.json").read_text())


def write_rows(folder, rows):
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "data")


def chats(n=16):
    return [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]}
        for i in range(n)
    ]


@pytest.mark.parametrize("written", ["qwen3", "llama3_1"])
def test_sft(tmp_path, monkeypatch, written):
    (
        byte_model().save_pretrained(tmp_path / "model"),
        byte_tokenizer(template(written)).save_pretrained(tmp_path / "model"),
    )
    data = write_rows(tmp_path, chats())
    record = run(tmp_path, monkeypatch, inspect.getsource(sft), "--model_name_or_path", str(tmp_path / "model"),
                 "--dataset_name", data, "--learning_rate", "2.0e-4")  # fmt: skip
    assert record["steps"]["done"] == 2 and record["metrics"][0]["echo/routed"] == 1
    assert "assistant's turns" in record["rows"]["answers"]


def mxfp4_checkpoint(model, folder):
    """The model as GPT-OSS is published: experts in blocks of 32 numbers of four bits."""
    state = dict(model.state_dict())
    for name in [name for name in state if name.endswith("_proj") and ".experts." in name]:
        rows, columns = state.pop(name).transpose(1, 2).shape[1:]
        experts = model.config.num_local_experts
        state[f"{name}_blocks"] = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        state[f"{name}_scales"] = torch.full((experts, rows, columns // 32), 124, dtype=torch.uint8)
    model.config.quantization_config = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    model.config.save_pretrained(folder)
    save_file(
        {name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )


@NEEDS_EXAMPLES
def test_sft_gpt_oss(tmp_path, monkeypatch):
    small = {"intermediate_size": 32, "vocab_size": 288, "max_position_embeddings": 2048, "eos_token_id": 1}
    model = family_model("gpt_oss", attention="eager", **small)
    byte_tokenizer(template("gptoss")).save_pretrained(tmp_path / "model")
    mxfp4_checkpoint(model, tmp_path / "model")
    rows = [
        {
            "reasoning_language": "German", "developer": "brief", "user": f"q{i}", "analysis": "x", "final": f"a{i}",
            "messages": [
                {"role": "system", "content": "reasoning language: German", "thinking": None},
                {"role": "user", "content": f"q{i}", "thinking": None},
                {"role": "assistant", "content": f"a{i}", "thinking": "x"},
            ],
        }
        for i in range(16)
    ]  # fmt: skip
    script = (EXAMPLES / "sft_gpt_oss.py").read_text()
    record = run(tmp_path, monkeypatch, script, "--model_name_or_path", str(tmp_path / "model"), "--dataset_name",
                 write_rows(tmp_path, rows), "--packing", "--max_length", "1024", "--attn_implementation", "eager",
                 "--per_device_train_batch_size", "1",
                 "--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr_rate": 0.1}',
                 "--lora_target_modules", "q_proj", "v_proj")  # fmt: skip
    assert record["steps"]["done"] == 2 and record["metrics"][0]["echo/routed"] == 1


@NEEDS_EXAMPLES
def test_sft_vlm(tmp_path, monkeypatch):
    model, processor = llava(UNMARKED)
    model.save_pretrained(tmp_path / "model"), processor.save_pretrained(tmp_path / "model")
    rows = image_rows(16, counts=(1,))
    for row in rows:  # as HuggingFaceH4/llava-instruct-mix-vsft has them
        for message in row["messages"]:
            message["content"] = [
                {"index": 0 if part["type"] == "image" else None, "text": part.get("text"), "type": part["type"]}
                for part in message["content"]
            ]
    (tmp_path / "data").mkdir()
    Dataset.from_list(rows).to_parquet(tmp_path / "data" / "train-0.parquet")
    script = (EXAMPLES / "sft_vlm.py").read_text()
    record = run(tmp_path, monkeypatch, script, "--model_name_or_path", str(tmp_path / "model"), "--dataset_name",
                 str(tmp_path / "data"), "--per_device_train_batch_size", "2", "--dtype", "float32",
                 "--gradient_accumulation_steps", "2", "--lora_target_modules", "down_proj", "o_proj", "k_proj",
                 "q_proj", "gate_proj", "up_proj", "v_proj")  # fmt: skip
    assert record["steps"]["done"] == 2 and record["metrics"][0]["echo/routed"] == 1
    assert torch.isfinite(torch.tensor(record["metrics"][0]["loss"]))
