"""Tiny bases and adapters for the serving tests, good ones from PEFT and broken ones by changing their files."""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    LlavaConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3MoeConfig,
)

from echo_trainer.compat.building import load_model

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
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
VARIED = {  # experts, a vision tower, and modules of other names
    "phi3": lambda: Phi3Config(**_SIZES, pad_token_id=0),
    "qwen3_moe": lambda: Qwen3MoeConfig(**_SIZES, **_EXPERTS, head_dim=8, decoder_sparse_step=1),
    "mixtral": lambda: MixtralConfig(**_SIZES, **_EXPERTS),
    "gpt_oss": lambda: GptOssConfig(**_SIZES, **_EXPERTS, head_dim=8, pad_token_id=0),
    "llava": lambda: LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        text_config=CONFIGS["llama"](),
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=28,
            patch_size=14,
        ),
        image_token_index=63,
    ),
}  # fmt: skip
_TRAINED: dict[Path, torch.Tensor] = {}
_KEPT = tempfile.TemporaryDirectory()
_MADE: dict[str, Path] = {}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IDS = torch.arange(40).reshape(2, 20) * 7 % 64


def save_base(family: str, folder: Path) -> Path:
    """Save a random model whose logits are far from uniform."""
    torch.manual_seed(11)
    config = {**CONFIGS, **VARIED}[family]()
    model_class = getattr(transformers, (config.architectures or [""])[0], None)
    make = model_class._from_config if model_class else transformers.AutoModelForCausalLM.from_config
    model = make(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() in (2, 3):
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path, size: int) -> None:
    """Put a tokenizer of words w0, w1, ... beside an adapter."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2").save_pretrained(folder)


def load_base(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return load_model(str(folder), dtype=dtype).eval()


def save_adapter(
    base: Path, folder: Path, dtype: torch.dtype = torch.float32, save_embedding_layers="auto", **settings
) -> Path:
    """Save an adapter whose every tensor was moved, as after training; one that was made before is copied."""
    settings = {"r": 16, "lora_alpha": 32, "target_modules": list(ALL), "task_type": "CAUSAL_LM", **settings}
    made = _MADE.setdefault(f"{base} {dtype} {save_embedding_layers} {settings}", Path(_KEPT.name, str(len(_MADE))))
    if made not in _TRAINED:
        _train(base, made, dtype, save_embedding_layers, settings)
    shutil.copytree(made, folder, dirs_exist_ok=True)
    _TRAINED[folder] = _TRAINED[made]
    torch.manual_seed(6)  # what a test draws next does not hang on what was made before
    return folder


def _train(base: Path, folder: Path, dtype: torch.dtype, save_embedding_layers, settings: dict) -> None:
    torch.manual_seed(5)
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
    model.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.float()  # as PEFT loads them
        vocabulary = model.config.get_text_config().vocab_size
        _TRAINED[folder] = model.eval()(input_ids=IDS % min(63, vocabulary)).logits


def trained_logits(folder: Path) -> torch.Tensor:
    """What the model computed whose adapter `save_adapter` saved in a folder, before anything was saved."""
    return _TRAINED[folder]


@torch.no_grad()
def logits(base: Path, adapter: Path | None = None, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """What PEFT computes, in a precision where rounding does not hide a difference."""
    model = load_base(base, dtype)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval().to(dtype)
    return model(input_ids=IDS % 63).logits  # 63 is the place of an image


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


def to_true_pickle(folder: Path) -> None:
    """The weights as PEFT wrote them before safetensors."""
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def copy_weights(folder: Path) -> None:
    shutil.copy(folder / WEIGHTS, folder / "adapter_model_old.safetensors")


def foreign_file(folder: Path) -> None:
    save_file({"model.norm.weight": torch.ones(32)}, folder / "model.safetensors")


def remove(name: str):
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)
