"""Adapters as LoraConfig can make them: each trains with an echo and is loaded as it was trained."""

import pytest
import torch
from datasets import Dataset
from models import prompt_completion_rows, tiny_model, tiny_tokenizer
from peft import LoraConfig, PeftModel
from training import SETTINGS
from transformers import AutoModelForCausalLM

from echo_trainer import EchoSFTConfig, EchoSFTTrainer

QV = ["q_proj", "v_proj"]
KINDS = {
    "the targets of PEFT": {},
    "targets by a pattern": {"target_modules": r".*layers\.\d+\.self_attn\.(q|v)_proj"},
    "layers by a pattern": {"target_modules": QV, "layers_to_transform": [0, 2, 4], "layers_pattern": "layers"},
    "some left out": {"target_modules": "all-linear", "exclude_modules": ["down_proj", "layers.4.self_attn.q_proj"]},
    "ranks of their own": {
        "target_modules": "all-linear", "rank_pattern": {"q_proj": 2, "layers.4.mlp.down_proj": 8},
        "alpha_pattern": {"q_proj": 4},
    },
    "saved modules": {"target_modules": QV, "modules_to_save": ["embed_tokens", "lm_head"]},
    "saved norms": {"target_modules": QV, "modules_to_save": ["input_layernorm"]},
    "trained tokens": {"target_modules": QV, "trainable_token_indices": [3, 4]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "dora on embeddings": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "pissa": {"target_modules": "all-linear", "init_lora_weights": "pissa"},
    "layers replicated": {"target_modules": QV, "layer_replication": [[0, 4], [2, 5]]},
}  # fmt: skip


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 14)[None]).logits


CASES = [
    *((kind, False) for kind in KINDS),
    *((kind, True) for kind in ("saved modules", "trained tokens", "embeddings")),
]


@pytest.mark.parametrize(("kind", "tied"), CASES)
def test_trained_saved_and_loaded(tmp_path, kind, tied):
    base = tmp_path / "base"
    tiny_model(tie_word_embeddings=tied).save_pretrained(base)
    trainer = EchoSFTTrainer(
        model=str(base),
        args=EchoSFTConfig(output_dir=str(tmp_path / "run"), **{**SETTINGS, "max_steps": 2, "echo_p_end": 1.0}),
        train_dataset=Dataset.from_list(prompt_completion_rows(8)),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=4, task_type="CAUSAL_LM", **KINDS[kind]),
    )
    trainer.train()
    assert [entry["echo/routed"] for entry in trainer.state.log_history if "echo/routed" in entry] == [1, 1]
    trainer.save_model()
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "run")
    torch.testing.assert_close(logits(loaded), logits(trainer.model), rtol=1e-4, atol=1e-4)
