"""Merging: what has no place in a merged model is refused in words, and what has one is there."""

import json

import adapter_cases as make
import pytest
import torch
from models import tiny_tokenizer
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoProcessor, CLIPImageProcessor, LlavaProcessor

from echo_trainer.adapter.logit_error import ExportError, probe_ids
from echo_trainer.export.forms import export_lora, export_merged, export_portable

QV = ["q_proj", "v_proj"]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=make.IDS % 63).logits


REFUSED = {
    "lora_bias": ("llama", {"lora_bias": True}, r"base that have none.*q_proj.*transformers and PEFT"),
    "lora_bias on some": ("qwen2", {"lora_bias": True, "target_modules": ["q_proj", "o_proj"]}, "have none.*o_proj"),
    "activated lora": ("llama", {"alora_invocation_tokens": [7, 14]}, r"aLoRA does not support merging.*PEFT"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_merged_is_refused_in_words(name, bases, tmp_path):
    family, settings, says = REFUSED[name]
    adapter = make.save_adapter(bases[family], tmp_path / "a", **settings)
    with pytest.raises(ExportError, match=says):
        export_merged(adapter, tmp_path / "out", bases[family])
    assert not (tmp_path / "out").exists()


def test_another_method_that_cannot_be_merged(bases, tmp_path):
    model = get_peft_model(
        make.load_base(bases["llama"]), PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    )
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(ExportError, match="PEFT cannot merge this PREFIX_TUNING adapter"):
        export_merged(tmp_path / "a", tmp_path / "out", bases["llama"])


@pytest.mark.parametrize("function", [export_merged, export_lora])
def test_an_adapter_that_peft_loads_and_nobody_can_run(function, bases, tmp_path):
    """A tied base with trained tokens and a saved head: PEFT's own forward fails."""
    settings = {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6], "modules_to_save": ["lm_head"]}
    config = LoraConfig(r=16, task_type="CAUSAL_LM", **settings)
    get_peft_model(make.load_base(bases["llama-tied"]), config).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=r"cannot be run|cannot become a LoRA"):
        function(tmp_path / "a", tmp_path / "out", bases["llama-tied"])


def test_an_adapter_of_mixtral_by_the_names_of_before(bases, tmp_path):
    """transformers 5 fuses the experts, and PEFT translates the adapter; the merged model has its own names."""
    adapter = make.save_adapter(bases["mixtral"], tmp_path / "a", target_modules=["w1", "w2", "w3"])
    error = export_merged(adapter, tmp_path / "out", bases["mixtral"], dtype="float32")
    assert error.largest < 1e-4
    expected = logits(PeftModel.from_pretrained(make.load_base(bases["mixtral"]), adapter))
    torch.testing.assert_close(logits(make.load_base(tmp_path / "out")), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", [QV, r".*language_model.*(q|v)_proj", ["linear_1", "linear_2"]])
def test_a_vision_language_model(targets, bases, tmp_path):
    """The class that the base names, the vocabulary of its text config, and its processor."""
    base = tmp_path / "base"
    model = make.load_base(bases["llava"])
    model.save_pretrained(base)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"height": 28, "width": 28}
    processor = LlavaProcessor(CLIPImageProcessor(size=size, crop_size=size), tokenizer, patch_size=14)
    processor.save_pretrained(base)
    adapter = make.save_adapter(base, tmp_path / "a", target_modules=targets)
    error = export_merged(adapter, tmp_path / "out", base, dtype="float32")
    assert (
        error.largest < 1e-4 and error.effect > 0
    ) or "linear_1" in targets  # text alone does not reach the connector
    merged = make.load_base(tmp_path / "out")
    assert type(merged) is type(model) and json.loads((tmp_path / "out/config.json").read_text())["vision_config"]
    loaded = PeftModel.from_pretrained(make.load_base(base), adapter).eval()
    image = AutoProcessor.from_pretrained(tmp_path / "out")
    assert type(image).__name__ == "LlavaProcessor"
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    ids = torch.tensor([[5, *[63] * 4, 7, 9]])
    with torch.no_grad():
        torch.testing.assert_close(
            merged(input_ids=ids, pixel_values=pixels).logits,
            loaded(input_ids=ids, pixel_values=pixels).logits, rtol=1e-4, atol=1e-4,
        )  # fmt: skip
    assert 63 not in probe_ids(model.config)


def test_the_portable_form_of_a_vision_language_adapter(bases, tmp_path):
    adapter = make.save_adapter(bases["llava"], tmp_path / "a", target_modules=QV, r=12)
    export_portable(adapter, tmp_path / "out", bases["llava"])
    expected = logits(PeftModel.from_pretrained(make.load_base(bases["llava"]), adapter))
    found = logits(PeftModel.from_pretrained(make.load_base(bases["llava"]), tmp_path / "out"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("replication", [[[0, 3], [0, 3]], [[1, 2], [0, 3], [1, 2]]])
def test_replicated_layers_have_weights_of_their_own(replication, bases, tmp_path):
    settings = {"layer_replication": replication, "target_modules": QV}
    adapter = make.save_adapter(bases["llama"], tmp_path / "a", **settings)
    export_merged(adapter, tmp_path / "out", bases["llama"], dtype="float32")
    merged = make.load_base(tmp_path / "out")
    depth = sum(end - start for start, end in replication)
    assert merged.config.num_hidden_layers == depth == len(merged.model.layers)
    weights = [layer.self_attn.q_proj.weight for layer in merged.model.layers]
    assert len({weight.data_ptr() for weight in weights}) == depth
    torch.testing.assert_close(logits(merged), make.trained_logits(adapter), rtol=1e-4, atol=1e-4)
