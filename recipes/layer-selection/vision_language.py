"""Fine-tune a LLaVA-style model with LoRA on the language layers that CKA chooses, by trl.SFTTrainer.

The vision tower and the projector stay frozen. Needs: LLaVA-1.5-7B in bf16 wants one GPU of 24 GB.
Prints the chosen layers and the loss; the adapter, the selection and its plot are left in --output.

    python recipes/layer-selection/vision_language.py --model llava-hf/llava-1.5-7b-hf \
        --dataset trl-lib/llava-instruct-mix --max-steps 500

The dataset has "images" with "messages", or with conversational "prompt" and "completion". A local --dataset is a
folder written by Dataset.save_to_disk.
"""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset, load_from_disk
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

from echo_trainer.selection import select_layers


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llava-hf/llava-1.5-7b-hf")
    parser.add_argument("--dataset", default="trl-lib/llava-instruct-mix")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device-map", default=None, help='"auto" spreads the model over the GPUs')
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--selection-batch-size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--max-steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/vision-language"))
    args = parser.parse_args(argv)

    local = Path(args.dataset).is_dir()
    dataset = load_from_disk(args.dataset) if local else load_dataset(args.dataset, split="train")
    processor = AutoProcessor.from_pretrained(args.model)
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=args.dtype, device_map=args.device_map)
    selection = select_layers(
        model,
        dataset,
        processing_class=processor,
        ratio=args.ratio,
        n_samples=args.samples,
        batch_size=args.selection_batch_size,
        seed=args.seed,
    )
    selection.to_json(args.output / "selection.json")
    selection.plot(args.output / "selection.png")
    print(f"layers of {selection.blocks_path}: {selection.layers} of {selection.num_layers}")
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(args.output),
            learning_rate=args.learning_rate,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            max_length=None,  # truncation could cut image tokens
            bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            seed=args.seed,
        ),
        train_dataset=dataset,
        processing_class=processor,
        peft_config=LoraConfig(r=args.rank, lora_alpha=2 * args.rank, **selection.lora_config_kwargs(model)),
    )
    trained = trainer.train()
    trainer.save_model()
    return {"layers": selection.layers, "loss": trained.training_loss, "trainer": trainer}


if __name__ == "__main__":
    main()
