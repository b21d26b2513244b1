"""What a run says of its own echo on held-out rows, where the ablations know the answer.

    bash recipes/ablation/strong.sh runs/ablation-strong --report-only     (makes the stories)
    python recipes/ablation/verdicts.py stories runs/ablation-strong/data
    python recipes/ablation/verdicts.py questions runs/ablation-upper/data --model MODEL_FOLDER

`stories`: the setting of strong.yaml, where the echo of another story knows nothing. `questions`: that of upper.yaml
on SmolLM2-135M, where the echo of another question does as well. Both are judged after the last step but one. A CPU.
"""

import argparse
import json
import logging
import random
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig

from echo_trainer import EchoSFTConfig, EchoSFTTrainer
from echo_trainer.quickstart.run import BASE

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS = {
    "stories": {"layers": (4, 8), "rows": 384, "steps": 200, "batch": 12, "rate": 4e-3},
    "questions": {"layers": (20, 30), "rows": 400, "steps": 75, "batch": 8, "rate": 5e-4},
}


def rows_of(path: Path) -> list[dict[str, str]]:
    """Prompts and completions of a file."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]


def main() -> None:
    """Train, judge, print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=SETTINGS)
    parser.add_argument("data", type=Path, help="folder of train.jsonl and test.jsonl")
    parser.add_argument("--model", default=str(BASE), help="default: the base that ships with the package")
    parser.add_argument("--preset", default="strong", choices=["strong", "paper"])
    parser.add_argument("--seed", type=int, default=600)
    parser.add_argument("--output", default="runs/verdicts")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("echo_trainer.run.probation").setLevel(logging.INFO)
    setting = SETTINGS[options.task]
    train, test = (rows_of(options.data / f"{name}.jsonl") for name in ("train", "test"))
    random.Random(options.seed).shuffle(train)
    trainer = EchoSFTTrainer(
        model=options.model,
        args=EchoSFTConfig(
            output_dir=options.output,
            echo_preset=options.preset,
            max_steps=setting["steps"] + 1,
            echo_probation=setting["steps"],
            per_device_train_batch_size=setting["batch"],
            learning_rate=setting["rate"],
            warmup_steps=10,
            max_length=128,
            gradient_checkpointing=False,
            frozen_prefix_cache=True,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            seed=options.seed,
        ),
        train_dataset=Dataset.from_list(train[: setting["rows"]]),
        eval_dataset=Dataset.from_list(test),
        peft_config=LoraConfig(
            r=16,
            lora_alpha=32,
            target_modules=MODULES,
            layers_to_transform=list(range(*setting["layers"])),
            layers_pattern="layers",
        ),
    )
    trainer.train()


if __name__ == "__main__":
    main()
