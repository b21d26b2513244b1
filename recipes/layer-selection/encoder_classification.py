"""Fine-tune an encoder for classification with LoRA on the layers that CKA chooses, by transformers.Trainer.

An encoder has no answer tokens, so this path has no echo: it shows layer selection by itself.
Needs: RoBERTa-base or DeBERTa-v3-base, 4 GB of memory, a GPU for more than a trial. Prints LoRA parameters and the
accuracy on the validation rows before and after; results.json in --output holds the same.

    python recipes/layer-selection/encoder_classification.py --model FacebookAI/roberta-base \
        --dataset nyu-mll/glue --subset rte --text-columns sentence1 sentence2 --layers cka
    python recipes/layer-selection/encoder_classification.py --model microsoft/deberta-v3-base \
        --dataset nyu-mll/glue --subset cola --text-columns sentence --layers cka

`--layers` also takes all, first-half-plus-last, last, random, uniform: the same number of layers, for comparison.
A local --dataset is a folder with train.jsonl and validation.jsonl.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from echo_trainer.selection import select_layers
from echo_trainer.selection.lora_config import lora_config_kwargs
from echo_trainer.selection.use import BASELINES, baseline_layers


def load_splits(dataset: str, subset: str | None):
    if Path(dataset).is_dir():
        files = {split: str(Path(dataset) / f"{split}.jsonl") for split in ("train", "validation")}
        return load_dataset("json", data_files=files)
    return load_dataset(dataset, subset)


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((np.argmax(prediction.predictions, axis=-1) == prediction.label_ids).mean())}


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="FacebookAI/roberta-base")
    parser.add_argument("--dataset", default="nyu-mll/glue")
    parser.add_argument("--subset", default=None)
    parser.add_argument("--text-columns", nargs="+", default=["sentence"], help="one column, or two for a pair")
    parser.add_argument("--layers", default="cka", choices=["cka", "all", *BASELINES])
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--samples", type=int, default=128, help="samples the selection reads")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/encoder"))
    args = parser.parse_args(argv)
    if len(args.text_columns) > 2:
        parser.error(f"--text-columns takes one or two columns, got {args.text_columns}")
    return args


def main(argv=None) -> dict:
    args = parse_args(argv)
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    splits = load_splits(args.dataset, args.subset)
    labels = sorted(set(splits["train"]["label"]))
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=len(labels))

    def tokenise(rows):
        texts = [rows[column] for column in args.text_columns]
        return tokenizer(*texts, truncation=True, max_length=args.max_length)

    columns = [c for c in splits["train"].column_names if c != "label"]
    data = splits.map(tokenise, batched=True, remove_columns=columns)

    selection = None
    depth = model.config.num_hidden_layers
    if args.layers == "all":
        layers = list(range(depth))
    else:
        selection = select_layers(
            model, data["train"], processing_class=tokenizer, ratio=args.ratio, n_samples=args.samples, seed=args.seed
        )
        selection.to_json(args.output / "selection.json")
        selection.plot(args.output / "selection.png")
        layers = selection.layers
        if args.layers != "cka":
            layers = baseline_layers(args.layers, depth, len(layers), args.seed)
    config = LoraConfig(
        task_type="SEQ_CLS", r=args.rank, lora_alpha=2 * args.rank, **lora_config_kwargs(model, layers)
    )
    model = get_peft_model(model, config)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output),
            learning_rate=args.learning_rate,
            num_train_epochs=args.epochs,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            warmup_steps=0.06,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            seed=args.seed,
        ),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    results = {
        "layers": layers,
        "lora_parameters": sum(p.numel() for name, p in model.named_parameters() if "lora_" in name),
        "accuracy_before": before,
        "accuracy_after": trainer.evaluate()["eval_accuracy"],
    }
    trainer.save_model()
    (args.output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))
    return results


if __name__ == "__main__":
    main()
