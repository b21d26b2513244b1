"""From training to a served model, for a vision-language model and mixtures of experts: trained with the echo, resumed
in the same bits, saved, checked, exported, and loaded again with the logits of the trained model."""

import json
import shutil
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from datasets import Dataset
from families import family_model
from models import lora_config, prompt_completion_rows, tiny_tokenizer
from peft import PeftModel
from training import SETTINGS, assert_equal, losses, trainable
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
from vision import UNMARKED, idefics3, image_rows, llava

from echo_trainer import EchoSFTConfig, EchoSFTTrainer, check_adapter, export_adapter

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ["q_proj", "v_proj"]


@dataclass
class Case:
    """A base on disk, what is trained on it, and the inputs of one comparison."""

    make: Any
    rows: Any
    lora: dict[str, Any]
    auto_class: Any
    settings: dict[str, Any]


def experts(family):
    def make():
        small = {"intermediate_size": 32} if family == "gpt_oss" else {}
        return family_model(family, attention="eager", **small), tiny_tokenizer()

    return make


def vision(lora, make=lambda: llava(UNMARKED)):
    return Case(make, lambda: image_rows(24), lora, AutoModelForImageTextToText, {"max_length": None})


def text(family, lora):
    return Case(experts(family), lambda: prompt_completion_rows(40), lora, AutoModelForCausalLM, {})


LANGUAGE = r".*(text_model|language_model).*(q_proj|v_proj|up_proj)"
CASES = {
    "llava": vision({"target_modules": LANGUAGE}),
    "idefics3": vision({"target_modules": LANGUAGE}, idefics3),
    "llava, tower and projector too": vision({"target_modules": "all-linear"}),
    "qwen3_moe, attention": text("qwen3_moe", {"target_modules": ATTENTION}),
    "qwen3_moe, experts": text("qwen3_moe", {"target_modules": ATTENTION, "target_parameters": EXPERTS}),
    "gpt_oss, experts": text("gpt_oss", {"target_modules": ATTENTION, "target_parameters": EXPERTS}),
    "mixtral": text("mixtral", {"target_modules": "all-linear"}),
}
# Experts and vision towers are not served by every engine, and `check` says so; see tests/adapter for what each does.
SERVED_BY_ALL = {"llava", "idefics3", "qwen3_moe, attention"}


def build(case, base, out, **settings):
    model = case.auto_class.from_pretrained(base, attn_implementation="eager")
    half = {"echo_p_start": 0.5, "echo_p_end": 0.5, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    options = {**SETTINGS, **half, "output_dir": str(out), **case.settings, **settings}
    processor = AutoProcessor.from_pretrained(base) if case.auto_class is AutoModelForImageTextToText else None
    return EchoSFTTrainer(
        model=model,
        args=EchoSFTConfig(**options),
        train_dataset=Dataset.from_list(case.rows()),
        processing_class=processor or tiny_tokenizer(),
        peft_config=lora_config(init_lora_weights=True, **case.lora),
    )


@pytest.mark.parametrize("name", CASES)
def test_the_whole_way(tmp_path, name):
    case, base = CASES[name], tmp_path / "base"
    model, processor = case.make()
    model.save_pretrained(base), processor.save_pretrained(base)

    trained = build(case, base, tmp_path / "run")
    batch = trained.data_collator([dict(row) for row in trained.train_dataset.select(range(3))])
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "echo_plan")}
    trained.train()
    assert any(entry.get("echo/routed") for entry in trained.state.log_history)

    shutil.copytree(tmp_path / "run" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    resumed = build(case, base, tmp_path / "again")
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(trained)
    assert_equal(trainable(resumed), trainable(trained))

    trained.save_model()
    run = tmp_path / "run"
    assert json.loads((run / "echo_run.json").read_text())["echo"]["seen"]["routed"] > 0
    assert not (run / "unloadable").exists()
    report = check_adapter(run, base=base)
    assert not [found.rule.name for found in report.findings if found.rule.broken]
    assert report.ok is (name in SERVED_BY_ALL), report.verdicts
    assert report.ok or all(found.where for found in report.findings)
    expected = logits(trained.model, inputs)

    bare = case.auto_class.from_pretrained(base, attn_implementation="eager")
    assert not torch.allclose(expected, logits(bare, inputs), atol=1e-3)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(bare, run), inputs), expected, rtol=1e-5, atol=1e-5)
    export_adapter(run, tmp_path / "merged", "merged", base, dtype="float32")
    merged = case.auto_class.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    torch.testing.assert_close(logits(merged, inputs), expected, rtol=1e-4, atol=1e-4)


def logits(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits
