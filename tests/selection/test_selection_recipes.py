"""The scripts of recipes/layer-selection run on tiny local models and leave what they say."""

import importlib.util
import json
import sys

import pytest
import torch
from datasets import Dataset
from paths import ROOT
from peft import PeftModel
from PIL import Image
from selection_models import FAMILIES, tiny_processor, tiny_tokenizer

from echo_trainer.selection import LayerSelection

FOLDER = ROOT / "recipes" / "layer-selection"


def load(name):
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save_model(family, folder, tokenizer):
    torch.manual_seed(0)
    model = FAMILIES[family]()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def sentences(count, seed):
    g = torch.Generator().manual_seed(seed)
    words = ["the", "film", "is", "a", "dog", "cat", "sun", "moon"]
    for _ in range(count):
        label = int(torch.randint(2, (), generator=g))
        noise = [words[i] for i in torch.randint(8, (4,), generator=g).tolist()]
        yield {"sentence": " ".join([*noise[:2], ("bad", "good")[label], *noise[2:]]), "label": label}


@pytest.mark.parametrize(("family", "layers"), [("roberta", "cka"), ("deberta-v3", "cka"), ("roberta", "uniform")])
def test_encoder_classification(tmp_path, family, layers):
    save_model(family, tmp_path / "model", tiny_tokenizer(encoder=True))
    (tmp_path / "data").mkdir()
    for split, count in (("train", 96), ("validation", 32)):
        rows = "".join(json.dumps(row) + "\n" for row in sentences(count, len(split)))
        (tmp_path / "data" / f"{split}.jsonl").write_text(rows, encoding="utf-8")
    options = [
        "--model",
        str(tmp_path / "model"),
        "--dataset",
        str(tmp_path / "data"),
        "--output",
        str(tmp_path / "out"),
    ]
    options += ["--samples", "32", "--batch-size", "16", "--max-steps", "60", "--learning-rate", "0.02"]
    recipe = load("encoder_classification")
    results = recipe.main([*options, "--layers", layers])
    selection = LayerSelection.from_json(tmp_path / "out" / "selection.json")
    assert selection.excluded == [0]
    assert results["layers"] == (selection.layers if layers == "cka" else [1, 3])
    assert results["accuracy_after"] > max(0.8, results["accuracy_before"])
    whole = recipe.main([*options, "--layers", "all", "--max-steps", "1"])
    assert whole["lora_parameters"] == 2 * results["lora_parameters"]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["layers_to_transform"] == [0, 1, 2, 3]


def test_vision_language(tmp_path):
    processor = tiny_processor()
    base = save_model("llava", tmp_path / "model", processor)
    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
    rows = [
        {
            "images": [Image.new("RGB", (8, 8), colour)],
            "prompt": [{"role": "user", "content": f"what colour is the {noun}"}],
            "completion": [{"role": "assistant", "content": name}],
        }
        for name, colour in colours.items()
        for noun in ("square", "dog", "cat", "sky")
    ]
    Dataset.from_list(rows).save_to_disk(tmp_path / "data")
    options = [
        "--model",
        str(tmp_path / "model"),
        "--dataset",
        str(tmp_path / "data"),
        "--output",
        str(tmp_path / "out"),
    ]
    options += ["--dtype", "float32", "--max-steps", "6", "--learning-rate", "0.01", "--rank", "4"]
    done = load("vision_language").main(options)
    assert len(done["layers"]) == 2
    losses = [entry["loss"] for entry in done["trainer"].state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    adapter = PeftModel.from_pretrained(base, tmp_path / "out")
    names = [name for name, module in adapter.named_modules() if hasattr(module, "lora_A")]
    assert names
    assert {int(name.split("language_model.layers.")[1].split(".")[0]) for name in names} == set(done["layers"])
    assert (tmp_path / "out" / "selection.png").stat().st_size > 5000


def test_smollm2_script_and_step_time(tmp_path, capsys, monkeypatch):
    save_model("llama", tmp_path / "model", tiny_tokenizer())
    rows = [
        {"instruction": "what colour is the " + w, "output": ("red", "blue")[i % 2]}
        for i, w in enumerate("abcdef" * 3)
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    options = ["--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "data.json"), "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["x", *options, "--samples", "12", "--other-seeds", "1"])
    load("smollm2_openbookqa").main()
    text = capsys.readouterr().out
    assert text.count("\n| ") == 5  # header and four layers
    selection = LayerSelection.from_json(tmp_path / "biased.json")
    assert f"biased:   {selection.layers}" in text
    assert LayerSelection.from_json(tmp_path / "debiased.json").importance == pytest.approx(
        [1 - c for c in selection.cka_debiased]
    )
    options = ["--model", str(tmp_path / "model"), "--selection", str(tmp_path / "biased.json")]
    monkeypatch.setattr(sys, "argv", ["x", *options, "--steps", "1", "--batch-size", "2", "--tokens", "8"])
    load("step_time").main()
    table = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    values = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in table[1:]}
    trainable = {name: int(row[1].replace(",", "")) for name, row in values.items()}
    assert trainable["all layers"] == 2 * trainable["cka"] == 2 * trainable["last"]
    assert float(values["last"][5]) < float(values["first-half-plus-last"][5]) < 1


def test_a_public_openbookqa_row_gets_the_same_wording():
    row = {
        "question_stem": "The sun is responsible for",
        "choices": {"text": ["puppies", "plants"], "label": ["A", "B"]},
        "answerKey": "B",
    }
    local = {
        "instruction": "Please choose the correct answer to the question: The sun is responsible for\n\n"
        "Answer1: puppies Answer2: plants\n\nAnswer format: answer1/answer2",
        "output": "the correct answer is answer2",
    }
    convert = load("smollm2_openbookqa").to_prompt_completion
    assert convert(row) == convert(local)


def test_cost_counts_the_operations(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--dim", "256", "--samples", "8", "--layers", "3", "--repeats", "1"])
    load("cost").main()
    text = capsys.readouterr().out
    # 4 Gram matrices of 2 n^2 d against 3 pairs of 3 products of 2 n d^2
    assert f"FLOPs {9 * 256 / (4 * 8):.1f} x" in text
    assert float(text.split("CKA value ")[1]) < 1e-3
