"""What the echo pass runs on batches of very different lengths: computed from its layouts, no model is run.

    python recipes/benchmarks/layouts.py

Every sample is routed. FLOPs and bytes are those of `echo_trainer.method.costs` at Llama-3-8B's shape with gradient
checkpointing, in bfloat16, and a kernel that computes pairs inside a document only.
"""

import numpy as np
import torch

from echo_trainer.method.costs import Cost, ModelShape, echo_cost
from echo_trainer.method.plan import make_plan
from echo_trainer.method.segments import find_segments
from echo_trainer.passes.echo import RECOMPUTED, ROWS, SUFFIX

LLAMA_3_8B = ModelShape(
    layers=32, first_target=4, hidden=4096, weights=218_103_808, activations=75_776, queries=4096, key_values=2048,
    itemsize=2, checkpointing=True, varlen=True,
)  # fmt: skip


def lognormal() -> tuple[np.ndarray, np.ndarray]:
    """16 packed rows of 8k tokens, 250 documents."""
    generator = np.random.default_rng(0)
    length = generator.lognormal(0.0, 1.0, 250)
    length = np.maximum((length / length.sum() * 0.95 * 16 * 8192).astype(int), 4)
    answer = np.clip((length * generator.beta(2.0, 2.5, 250)).astype(int), 2, length - 1)
    return length - answer, answer


def one_long_prompt() -> tuple[np.ndarray, np.ndarray]:
    """7,500 tokens among 822 short documents."""
    generator = np.random.default_rng(0)
    prompt, answer = generator.integers(5, 150, 823), generator.integers(5, 120, 823)
    prompt[-1] = 7500
    return prompt, answer


def uniform() -> tuple[np.ndarray, np.ndarray]:
    """Prompts of 16 to 2,048 tokens, answers of 16 to 512."""
    generator = np.random.default_rng(0)
    return generator.integers(16, 2048, 64), generator.integers(16, 512, 64)


MIXES = {
    "log-normal, 250 documents": lognormal(),
    "one long prompt, 823 documents": one_long_prompt(),
    "uniform, 64 documents": uniform(),
    "256 + 16, 64 documents": (np.full(64, 256), np.full(64, 16)),
}


def main() -> None:
    print("| mix | pass | passes | run / batch | padding | PFLOP | GiB kept |\n|---|---|---|---|---|---|---|")
    for name, (prompts, answers) in MIXES.items():
        ends = np.cumsum(prompts + answers)
        places = np.concatenate([np.arange(n) for n in prompts + answers])
        labels = np.full(ends[-1], -100)
        for end, answer in zip(ends, answers, strict=True):
            labels[end - answer : end] = 1
        batch = {"labels": torch.from_numpy(labels)[None], "position_ids": torch.from_numpy(places)[None]}
        batch["input_ids"] = batch["labels"].clamp(min=1)
        segments = find_segments(batch)
        for title, form, n_parts in (
            ("full", ROWS, None),
            ("suffix, one pass", SUFFIX, 1),
            ("suffix, stored", SUFFIX, None),
            ("suffix, recomputed", RECOMPUTED, None),
        ):
            options = {"form": form, "n_parts": n_parts, "position_ids": batch["position_ids"]}
            plan = make_plan(segments, [True] * segments.n_documents, **options)
            cost = echo_cost(plan.layout, segments, LLAMA_3_8B)
            tokens = len(labels)
            run, real, passes = tokens, tokens, 1
            if form.runs_suffixes:
                parts, passes = plan.layout.parts, plan.n_parts
                run, real = (sum(sizes) for sizes in zip(*_sizes(parts), strict=True))
                if n_parts == 1:  # kept as it once was: every prefix as long as the longest
                    padded = parts[0].token_RA.shape[0] * parts[0].n_prefix - len(parts[0].prefix_n)
                    cost = _with(cost, padded * 28 * LLAMA_3_8B.key_values * LLAMA_3_8B.itemsize)
            print(
                f"| {name} | {title} | {passes} | {run / tokens:.2f} | {1 - real / run:.1%} | {cost.flops / 1e15:.2f} "
                f"| {cost.saved_bytes / 2**30:.1f} |"
            )


def _sizes(parts: tuple) -> list[tuple[int, int]]:
    return [(part.token_RA.numel(), len(part.real_token)) for part in parts]


def _with(cost: Cost, more: float) -> Cost:
    return Cost(cost.flops, cost.saved_bytes + more, cost.overhead)


if __name__ == "__main__":
    main()
