"""Tokens that were added for training: evaluation, merging and the card's commands know them, with equal numbers."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from models import AutoModelForCausalLM, lora_config, tiny_model, tiny_tokenizer
from training import echo_trainer

from echo_trainer import evaluate_adapter
from echo_trainer.evaluation.generation import greedy_answers
from echo_trainer.export.forms import export_merged

NEW = ["<a>", "<b>", "<c>", "<d>", "<e>"]
ROWS = [{"prompt": f"w{i} <a> w{i + 3} <b>", "completion": f" <c> w{i} {NEW[i % 5]}"} for i in range(16)]
ADAPTERS = {
    "lora": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "saved modules": {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"target_modules": ["q_proj", "v_proj"], "trainable_token_indices": list(range(60, 65))},
}


@pytest.fixture(scope="module", params=ADAPTERS)
def run(request, tmp_path_factory):
    """A finished run whose tokenizer has five tokens more than its base: (folder, base, trainer)."""
    folder = tmp_path_factory.mktemp("run")
    tiny_model().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(NEW)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    model.resize_token_embeddings(len(tokenizer))
    lora = lora_config(init_lora_weights=False, **ADAPTERS[request.param])
    trainer = echo_trainer(
        folder / "out", model=model, lora=lora, rows=ROWS, max_steps=3, trainer_kwargs={"processing_class": tokenizer}
    )
    trainer.train()
    trainer.save_model()
    (folder / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder / "out", folder / "base", trainer


def nats(name, task, output):
    return evaluate_adapter(name, [str(task)], mode="nll", output=output, device="cpu")["results"][0]["value"]


def test_evaluated_as_it_was_trained_and_merged(run, tmp_path):
    out, base, trainer = run
    task = out.parent / "task.jsonl"
    export_merged(out, tmp_path / "merged", base, dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = trainer.processing_class([row["prompt"] for row in ROWS[:1]], return_tensors="pt").input_ids
    assert merged.get_input_embeddings().num_embeddings == 65 and int(ids.max()) >= 60
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    value = nats(out, task, tmp_path / "a")
    assert value == pytest.approx(nats(tmp_path / "merged", task, tmp_path / "m"), rel=1e-4)


def test_the_card_resizes_the_base(run):
    out, base, trainer = run
    assert json.loads((out / "echo_run.json").read_text())["resized_vocabulary"] == 65
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    assert "model.resize_token_embeddings(65)" in code
    prompt = f"{ROWS[1]['prompt']} <e>"
    code = re.sub(r"(?m)^prompt = .*$", f"prompt = {prompt!r}", code)
    code = "import sys; sys.modules['echo_trainer'] = None\n" + code
    done = subprocess.run([sys.executable, "-c", code], cwd=out, env=os.environ | {"BASE": str(base)}, text=True,
                          capture_output=True, check=True)  # fmt: skip
    answer = greedy_answers(trainer.model, trainer.processing_class, [prompt], max_new_tokens=64)[0]
    assert done.stdout.strip() == answer.strip()


@pytest.mark.parametrize("mode", ["nll", "generate"])
def test_a_model_with_fewer_rows_than_tokens_is_evaluated(mode, run, tmp_path, caplog):
    """A base with the tokenizer of a training: no IndexError, and what is random is said."""
    out, base, trainer = run
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(tmp_path / "model")
    trainer.processing_class.save_pretrained(tmp_path / "model")
    found = evaluate_adapter(tmp_path / "model", [str(out.parent / "task.jsonl")], mode=mode, output=tmp_path / "o",
                             device="cpu", max_new_tokens=4)  # fmt: skip
    assert found["results"][0]["n"] == len(ROWS)
    assert "65 tokens, and the model 60 rows" in caplog.text


def test_an_ordinary_card_resizes_nothing(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    trainer = echo_trainer(tmp_path / "o", model=AutoModelForCausalLM.from_pretrained(tmp_path / "base"), max_steps=1)
    trainer.train()
    trainer.save_model()
    assert "resize_token_embeddings" not in (tmp_path / "o/README.md").read_text()
