"""Choose the layers of SmolLM2-135M on OpenBookQA: scores, stability, plot, comparison with the published code.

Needs: 2 GB of memory; about a minute for each draw of samples on one core. Expect: the table of this folder's README.

    python recipes/layer-selection/smollm2_openbookqa.py
    python recipes/layer-selection/smollm2_openbookqa.py --reference path/to/decoder-only/select_layers_decoder.py

`--reference` takes the file of github.com/c2d-usp/Layer-wise-LoRA-with-CKA and runs its own extraction and scoring on
the same tokens. Local copies can be given as --model FOLDER and --dataset FILE.json (keys instruction and output).
"""

import argparse
import importlib.util
import json
from itertools import pairwise
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from echo_trainer.selection import choose_layers, select_layers
from echo_trainer.selection.representations import collect_representations, find_blocks
from echo_trainer.selection.samples import draw_rows, encode_row, make_batches
from echo_trainer.selection.use import BASELINES, baseline_layers, echo_layers


def to_prompt_completion(row: dict) -> dict:
    """A row of allenai/openbookqa, or of the LLM-Adapters files, in the wording of LLM-Adapters."""
    if "instruction" in row:
        return {"prompt": row["instruction"] + "\n\n", "completion": row["output"]}
    choices = row["choices"]["text"]
    answers = " ".join(f"Answer{k}: {text}" for k, text in enumerate(choices, 1))
    names = "/".join(f"answer{k}" for k in range(1, len(choices) + 1))
    right = row["choices"]["label"].index(row["answerKey"]) + 1
    stem = row["question_stem"]
    return {
        "prompt": f"Please choose the correct answer to the question: {stem}\n\n{answers}\n\n"
        f"Answer format: {names}\n\n",
        "completion": f"the correct answer is answer{right}",
    }


def load_rows(dataset: str) -> list[dict]:
    if Path(dataset).is_file():
        rows = json.loads(Path(dataset).read_text(encoding="utf-8"))
    else:
        rows = load_dataset(dataset, "main", split="train")
    return [to_prompt_completion(row) for row in rows]


def representations_of(model, tokenizer, rows, args, seed):
    samples = [encode_row(row, tokenizer, args.max_length) for row in draw_rows(rows, args.samples, seed)]
    batches = make_batches(samples, args.batch_size, tokenizer.pad_token_id)
    final_norm = not args.bare_last_layer
    return collect_representations(model, batches, pooling="last", blocks=find_blocks(model), final_norm=final_norm)


def compare_with_reference(path: str, model, tokenizer, rows, args) -> dict:
    """The published extraction, scores and order on the same tokens, one sample at a time, against ours in batches."""
    spec = importlib.util.spec_from_file_location("published_reference", path)
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    drawn = draw_rows(rows, args.samples, args.seed)
    ids = [encode_row(row, tokenizer, args.max_length)["input_ids"][0].tolist() for row in drawn]
    depth = len(find_blocks(model))
    theirs = reference.extract_representations_from_autoregressive_model(
        model, tokenizer, Dataset.from_dict({"input_ids": ids, "labels": ids}), model.device, 1, list(range(depth + 1))
    )
    cka = [reference.linear_cka(theirs[i], theirs[i + 1]) for i in range(depth)]
    order = list(reference.sort_layers_by_cka(cka))
    ours = select_layers(
        model,
        [{"input_ids": row} for row in ids],
        processing_class=tokenizer,
        batch_size=args.batch_size,
        n_bootstrap=0,
    )
    return {
        "ranking_equal": order == ours.ranking,
        "largest_difference_of_cka": max(abs(a - b) for a, b in zip(cka, ours.cka_biased, strict=True)),
        "smallest_gap_between_neighbours_in_rank": min(
            ours.importance[a] - ours.importance[b] for a, b in pairwise(ours.ranking)
        ),
        "reference_ranking": order,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--dataset", default="allenai/openbookqa", help="public id, or a JSON file")
    parser.add_argument("--output", type=Path, default=Path("runs/layer-selection"))
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--other-seeds", type=int, default=3, help="further draws of samples, to see what moves")
    parser.add_argument("--bare-last-layer", action="store_true", help="R_L before the final norm")
    parser.add_argument("--reference", help="select_layers_decoder.py of the published code, to compare with")
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = load_rows(args.dataset)
    representations = representations_of(model, tokenizer, rows, args, args.seed)
    biased, debiased = (
        choose_layers(representations, ratio=args.ratio, debiased=b, seed=args.seed) for b in (False, True)
    )
    for name, selection in (("biased", biased), ("debiased", debiased)):
        selection.pooling, selection.final_norm = "last", not args.bare_last_layer
        selection.blocks_path, selection.model = find_blocks(model).path, args.model
        selection.to_json(args.output / f"{name}.json")
        selection.plot(args.output / f"{name}.png")
    print("\n| layer | chosen | importance | 95 % interval | stability | debiased importance | stability |")
    print("|---|---|---|---|---|---|---|")
    for i in range(biased.num_layers):
        low, high = biased.intervals[i]
        print(
            f"| {i} | {'x' if i in biased.layers else ''} | {biased.importance[i]:.4f} | {low:.4f} to {high:.4f} | "
            f"{biased.stability[i]:.2f} | {debiased.importance[i]:.4f} | {debiased.stability[i]:.2f} |"
        )
    print(f"\nbiased:   {biased.layers}\ndebiased: {debiased.layers}")
    sources, targets = echo_layers(biased)
    print(f"echo: sources {sources}, targets {targets}")
    for name in BASELINES:
        layers = baseline_layers(name, biased.num_layers, len(biased.layers), args.seed)
        print(f"{name}: {layers}, shares {len(set(layers) & set(biased.layers))} of {len(layers)}")
    for seed in range(args.seed + 1, args.seed + 1 + args.other_seeds):
        other = choose_layers(representations_of(model, tokenizer, rows, args, seed), ratio=args.ratio, n_bootstrap=0)
        print(f"other samples (seed {seed}): {other.layers}")
    if args.reference:
        print("reference:", json.dumps(compare_with_reference(args.reference, model, tokenizer, rows, args), indent=2))


if __name__ == "__main__":
    main()
