"""Time, FLOPs and trainable parameters of a LoRA training step with all layers and with half of them.

Needs: 5 GB of memory; about 3 minutes on one core. The variants take turns, so a busy machine slows all of them alike.
Expect: the table of this folder's README. The saving comes from the lowest adapted layer: below it nothing is
propagated back, above it a frozen layer still passes the gradient on.

    python recipes/layer-selection/step_time.py --selection runs/layer-selection/biased.json
"""

import argparse
import gc
import statistics
import time

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from echo_trainer.selection import LayerSelection
from echo_trainer.selection.lora_config import lora_config_kwargs
from echo_trainer.selection.use import baseline_layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--selection", required=True, help="JSON file that LayerSelection.to_json wrote")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each variant, after one warm-up step")
    args = parser.parse_args()
    selection = LayerSelection.from_json(args.selection)
    depth, count = selection.num_layers, len(selection.layers)
    variants = {
        "all layers": list(range(depth)),
        "cka": selection.layers,
        # the next best one in its place: only the lowest adapted layer moves up
        "cka without layer 0": sorted([i for i in selection.ranking if i != 0][:count]),
        **{name: baseline_layers(name, depth, count) for name in ("first-half-plus-last", "last")},
    }
    torch.manual_seed(0)
    runs = {}
    for name, layers in variants.items():
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        model = get_peft_model(model, LoraConfig(r=args.rank, **lora_config_kwargs(model, layers))).train()
        runs[name] = model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.randint(0, model.config.vocab_size, (args.batch_size, args.tokens))

    def step(name: str) -> None:
        model, optimizer = runs[name]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    flops, seconds = {}, {name: [] for name in runs}
    for name in runs:
        with FlopCounterMode(display=False) as counter:
            step(name)
        flops[name] = counter.get_total_flops()
    for _ in range(args.steps):
        for name in runs:
            gc.collect()
            start = time.perf_counter()
            step(name)
            seconds[name].append(time.perf_counter() - start)

    print(f"{args.batch_size} x {args.tokens} tokens, rank {args.rank}, {torch.get_num_threads()} threads")
    print("| adapted | layers | trainable | seconds per step (median) | of all layers | GFLOP | of all layers |")
    print("|---|---|---|---|---|---|---|")
    for name, (model, _) in runs.items():
        trainable = model.get_nb_trainable_parameters()[0]
        # paired: the ratio within each turn, then the median
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["all layers"], strict=True))
        print(
            f"| {name} | {len(variants[name])} | {trainable:,} | {statistics.median(seconds[name]):.3f} | {ratio:.3f} "
            f"| {flops[name] / 1e9:.1f} | {flops[name] / flops['all layers']:.3f} |"
        )


if __name__ == "__main__":
    main()
