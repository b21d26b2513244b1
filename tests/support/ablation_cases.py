"""A tiny ablation: base, data and recipe in a folder, and runs of it in this process."""

import json

import yaml
from models import prompt_completion_rows, tiny_model, tiny_tokenizer

from echo_trainer.ablation.arms import ARMS
from echo_trainer.ablation.plan import Run, specification
from echo_trainer.ablation.recipe import AblationRecipe, load_recipe
from echo_trainer.ablation.run_one import Workbench, build_trainer, run_one
from echo_trainer.quiet import quiet_libraries

TRAINING = {
    "max_steps": 3, "per_device_train_batch_size": 4, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0,
    "warmup_steps": 1, "gradient_checkpointing": False, "bf16": False, "use_cpu": True, "logging_steps": 1,
}  # fmt: skip

UNTAUGHT = [name for name, arm in ARMS.items() if arm.teacher is None]
"""Arms without a second training."""
LABELS = {
    "labels": {"prompts": 9, "steps": 2, "learning_rate": 0.005, "ratio": "1:3", "max_new_tokens": 6},
    "train_draw": "seed",
    "train_limit": 20,
}
"""Of a recipe with arms that have one."""


def write_workplace(folder, training=None, **section):
    """A base model, data and `recipe.yaml`; returns the recipe's path."""
    tiny_model().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    for split, n in (("train", 40), ("test", 8)):
        lines = [json.dumps(row) for row in prompt_completion_rows(n, seed=n)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    recipe = {
        "model_name_or_path": str(folder / "base"),
        **TRAINING,
        **(training or {}),
        "ablation": {
            "train": [str(folder / "train.jsonl")],
            "validation_items": 4,
            "tests": [{"name": "words", "file": str(folder / "test.jsonl"), "max_new_tokens": 3}],
            "learning_rates": [0.01],
            "seeds": [0],
            **section,
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def tiny_recipe(folder, training=None, **section) -> AblationRecipe:
    return load_recipe(write_workplace(folder, training, **section))


def do(recipe, output, arm, *, bench=None, adapter="lora", seed=0, rate=0.01, max_steps=None):
    """Carry out one run here and return its result."""
    run = Run(arm, adapter, seed, rate, max_steps)
    with quiet_libraries():
        return run_one(bench or Workbench(recipe), run, specification(recipe, run, {}), output, lambda *a: None)


def trainer_of(bench, folder, arm, adapter="lora", max_steps=None):
    """The trainer of one run, not trained yet."""
    with quiet_libraries():
        return build_trainer(bench, Run(arm, adapter, 0, 0.01, max_steps), folder, lambda *a: None)
