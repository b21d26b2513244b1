"""The public names at the root of the package: there without torch until they are used, and they do what they say."""

import inspect
import json
import subprocess
import sys

import adapter_cases as make
import pytest
from models import prompt_completion_rows, tiny_model, tiny_tokenizer

import echo_trainer
from echo_trainer import AdapterError, evaluate_adapter, export_adapter

NAMES = [name for name in echo_trainer.__all__ if name != "__version__"]


def test_importing_the_package_imports_no_torch():
    code = "import sys, echo_trainer; print([n for n in ('torch', 'transformers', 'trl', 'peft') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", NAMES)
def test_public_names_are_there_and_explained(name):
    public = getattr(echo_trainer, name)
    text = inspect.getdoc(public)
    assert name in dir(echo_trainer) and len(text) > 40
    if inspect.isfunction(public):  # every parameter is explained by name
        missing = [p for p in inspect.signature(public).parameters if f"{p}:" not in text and f"{p} " not in text]
        assert not missing, missing
        assert "Returns:" in text and "Raises:" in text, text


def test_names_that_are_not_public_are_refused_by_name():
    with pytest.raises(AttributeError, match="has no attribute 'make_better'"):
        _ = echo_trainer.make_better


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base and an adapter beside their tokenizer, and a file of tasks."""
    folder = tmp_path_factory.mktemp("api")
    tiny_model().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    make.save_adapter(folder / "base", folder / "adapter", r=4, target_modules=["q_proj", "v_proj"])
    tiny_tokenizer().save_pretrained(folder / "adapter")
    (folder / "words.jsonl").write_text("\n".join(json.dumps(row) for row in prompt_completion_rows(5)))
    return folder


def test_evaluate_adapter(trained, tmp_path):
    seen = []
    found = evaluate_adapter(
        trained / "adapter", str(trained / "words.jsonl"), base=str(trained / "base"), mode="nll", output=tmp_path,
        watch=lambda loaded, tasks: lambda task, n: seen.append(n),
    )  # fmt: skip
    assert sum(seen) == 5 and found["results"][0]["value"] > 0 and found["written"] is None
    assert json.loads((tmp_path / "results.nll.json").read_text())["results"] == found["results"]
    with pytest.raises(ValueError, match="limit is 0; it must be at least 1"):
        evaluate_adapter(trained / "adapter", str(trained / "words.jsonl"), limit=0)
    with pytest.raises(ValueError, match="num_beams=2 is for mode generate"):
        evaluate_adapter(trained / "adapter", str(trained / "words.jsonl"), mode="nll", num_beams=2)


def test_export_adapter(trained, tmp_path):
    error = export_adapter(trained / "adapter", tmp_path / "merged", "merged", dtype="float32")
    assert error.largest < 1e-4 and (tmp_path / "merged" / "config.json").exists()
    for form, options, message in (
        ("onnx", {}, "form='onnx' is unknown. Choose one of: portable, merged, lora, gguf"),
        ("merged", {"rank": 8}, "'merged' knows no option rank; it has dtype"),
        ("portable", {"dtyp": "x", "ranks": 8}, "knows no option dtyp, ranks; it has rank"),
    ):
        with pytest.raises(AdapterError, match=message):
            export_adapter(trained / "adapter", tmp_path / "nothing", form, **options)
    assert not (tmp_path / "nothing").exists()
