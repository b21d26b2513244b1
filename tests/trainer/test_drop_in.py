"""A script for `SFTTrainer` runs after changing only the import and the two class names."""

import subprocess
import sys

import pytest
from models import tiny_model, tiny_tokenizer
from paths import SUPPORT

# In the style of TRL's own examples.
SCRIPT = """
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

dataset = Dataset.from_list(
    [{"prompt": f"w{i % 40} w{i % 7} w3", "completion": f" w{i % 5} w{i % 11}"} for i in range(64)]
).train_test_split(test_size=8, seed=0)

training_args = SFTConfig(
    output_dir="out",
    max_steps=4,
    learning_rate=1e-3,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    eval_strategy="steps",
    eval_steps=2,
    logging_steps=1,
    use_cpu=True,
    report_to="none",
)
trainer = SFTTrainer(
    model="base",
    args=training_args,
    train_dataset=dataset["train"],
    eval_dataset=dataset["test"],
    peft_config=LoraConfig(r=8, target_modules="all-linear"),
)
trainer.train()
trainer.save_model(training_args.output_dir)
print("columns", *sorted(key for entry in trainer.state.log_history for key in entry))
"""


@pytest.mark.parametrize("echo", [False, True], ids=["trl", "echo"])
def test_script(tmp_path, echo):
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    script = SCRIPT
    if echo:
        script = script.replace("from trl import", "from echo_trainer import")
        script = script.replace("SFTConfig", "EchoSFTConfig").replace("SFTTrainer", "EchoSFTTrainer")
        changed = [a for a, b in zip(SCRIPT.splitlines(), script.splitlines(), strict=True) if a != b]
        assert len(changed) == 3
    (tmp_path / "train.py").write_text(script)
    run = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    columns = run.stdout.split("columns")[1].split()
    assert {"loss", "eval_loss", "entropy", "mean_token_accuracy", "num_tokens"} <= set(columns)
    assert ("echo/ce_echo" in columns) is echo


def test_import_is_light():
    """Importing the package imports none of the heavy libraries."""
    heavy = ("torch", "transformers", "trl", "peft", "datasets", "evaluate", "matplotlib", "numpy")
    code = f"import sys, echo_trainer, echo_trainer.cli; print([m for m in {heavy!r} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=SUPPORT)
    assert run.stdout.strip() == "[]"
