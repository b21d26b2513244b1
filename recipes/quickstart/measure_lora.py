"""Measure the quickstart's task without Echo: the base as it is, then plain LoRA with `trl.SFTTrainer`.

    python recipes/quickstart/measure_lora.py            # prints the figures that are in README.md

Answers are generated greedily, in batches padded on the left, and count only if they are exactly the reference.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from datasets import load_dataset
from make_data import PACKAGE_DATA
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


@torch.no_grad()
def exact_match(model, tokenizer, items: list[dict[str, str]], batch: int = 100) -> dict[str, float]:
    """Share of answers that equal the reference, and that name the right holder and the right place."""
    model.eval()
    right = {"exact": 0, "holder": 0, "place": 0}
    for begin in range(0, len(items), batch):
        rows = items[begin : begin + batch]
        inputs = tokenizer([r["prompt"] for r in rows], return_tensors="pt", padding=True, padding_side="left")
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, text in zip(rows, texts, strict=True):
            _, holder, _, _, place = row["completion"].strip(" .").split()
            words = text.replace(".", "").split()
            right["exact"] += text == row["completion"]
            right["holder"] += words[1:2] == [holder]
            right["place"] += words[-1:] == [place]
    return {name: count / len(items) for name, count in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=PACKAGE_DATA / "base")
    parser.add_argument("--data", type=Path, default=PACKAGE_DATA)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=int, default=32)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.base)
    files = {name: str(args.data / f"{name}.jsonl") for name in ("train", "test")}
    test = [json.loads(line) for line in Path(files["test"]).read_text(encoding="utf-8").splitlines()]
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    print("base", exact_match(base, tokenizer, test), flush=True)
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as out:
            config = SFTConfig(
                output_dir=out,
                max_steps=args.steps,
                per_device_train_batch_size=args.batch,
                learning_rate=args.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=10,
                weight_decay=0.0,
                seed=seed,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                logging_steps=50,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
            trainer = SFTTrainer(
                model=AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32),
                args=config,
                train_dataset=load_dataset("json", data_files=files, split="train", cache_dir=out),
                processing_class=tokenizer,
                peft_config=LoraConfig(
                    r=args.rank, lora_alpha=args.alpha, lora_dropout=args.dropout, target_modules="all-linear"
                ),
            )
            start, cpu = time.perf_counter(), time.process_time()
            trainer.train()
            wall, cpu = time.perf_counter() - start, time.process_time() - cpu
            print(
                f"seed {seed}: {wall:.1f} s ({cpu:.1f} s of CPU)",
                exact_match(trainer.model, tokenizer, test),
                flush=True,
            )


if __name__ == "__main__":
    main()
