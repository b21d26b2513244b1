"""Tiny bases and adapters for the serving tests, good ones from PEFT and broken ones by changing their files."""

import hashlib
import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

WEIGHTS = "adapter_model.safetensors"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
          "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
CONFIGS = {
    "llama": lambda: LlamaConfig(**_SIZES, tie_word_embeddings=False),
    "llama-served": lambda: LlamaConfig(**_SIZES, head_dim=32, tie_word_embeddings=False, eos_token_id=1),
    "llama-tied": lambda: LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**_SIZES),  # q, k and v have biases
    "gpt2": lambda: GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64),  # Conv1D
}
IDS = torch.arange(40).reshape(2, 20) * 7 % 64


def save_base(family: str, folder: Path) -> Path:
    """Save a random model whose logits are far from uniform."""
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    return folder


def load_base(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def save_adapter(base: Path, folder: Path, dtype: torch.dtype = torch.float32, **settings) -> Path:
    """Save an adapter whose every tensor was moved, as after training."""
    torch.manual_seed(5)
    settings = {"r": 16, "lora_alpha": 32, "target_modules": list(ALL), "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(load_base(base), LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_" in name:
                parameter.normal_(std=0.1)
            elif "lora_magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            elif parameter.requires_grad and "lora_" not in name:
                parameter.add_(0.1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(base: Path, adapter: Path | None = None, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """What PEFT computes, in a precision where rounding does not hide a difference."""
    model = load_base(base, dtype)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval().to(dtype)
    return model(IDS).logits


def edit_config(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    for name, value in changes.items():
        config.pop(name, None) if value is ... else config.update({name: value})
    path.write_text(json.dumps(config))


def edit_tensors(folder: Path, change) -> None:
    """Replace the tensors by ``change(tensors)``, a new dict."""
    tensors = change(load_file(folder / WEIGHTS))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS)


def config(**changes):
    return lambda folder: edit_config(folder, **changes)


def tensors(change):
    return lambda folder: edit_tensors(folder, change)


def rename(old: str, new: str):
    return tensors(lambda all_: {name.replace(old, new): value for name, value in all_.items()})


def add(**new):
    return tensors(lambda all_: all_ | {name.replace("__", "."): value for name, value in new.items()})


def value(key: str, number: float):
    def change(all_):
        all_["base_model.model." + key].view(-1)[-1] = number
        return all_

    return tensors(change)


def drop(*parts: str):
    return tensors(lambda all_: {k: v for k, v in all_.items() if not any(part in k for part in parts)})


def reshape(part: str, change):
    return tensors(lambda all_: {name: change(value) if part in name else value for name, value in all_.items()})


def other_method(settings):
    """Replace the adapter by one of another PEFT method."""

    def change(folder: Path) -> None:
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        for path in folder.iterdir():
            path.unlink()
        get_peft_model(load_base(Path(base)), settings).save_pretrained(folder)

    return change


def cut(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def to_lfs_pointer(folder: Path) -> None:
    """What a clone holds where git-lfs is not installed, written as git-lfs writes it."""
    data = (folder / WEIGHTS).read_bytes()
    oid = hashlib.sha256(data).hexdigest()
    (folder / WEIGHTS).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(data)}\n")


def to_pickle(folder: Path) -> None:
    """A pickle that fails the test when it is opened."""
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\n_exit\n(I70\ntR.")


def copy_weights(folder: Path) -> None:
    shutil.copy(folder / WEIGHTS, folder / "adapter_model_old.safetensors")


def foreign_file(folder: Path) -> None:
    save_file({"model.norm.weight": torch.ones(32)}, folder / "model.safetensors")


def remove(name: str):
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)
