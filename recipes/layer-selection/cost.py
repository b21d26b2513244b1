"""What CKA of all neighbouring layers costs: sample space (ours, float64) against feature space (published, float32).

Needs: 1 GB of memory; about a minute on 2 cores. Expect: the table of this folder's README.

    python recipes/layer-selection/cost.py --dim 4096 --samples 128 --layers 32
"""

import argparse
import time
from itertools import pairwise

import torch
from torch.utils.flop_counter import FlopCounterMode

from echo_trainer.cka import consecutive_cka


def feature_space(x_nd: torch.Tensor, y_nd: torch.Tensor) -> float:
    """||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F) of column-centred X, Y: three d x d products for each pair."""
    x, y = x_nd - x_nd.mean(0), y_nd - y_nd.mean(0)
    return float((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


def measure(function, repeats: int) -> tuple[list[float], int, object]:
    with FlopCounterMode(display=False) as counter:
        value = function()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return seconds, counter.get_total_flops(), value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = [torch.randn(args.samples, args.dim)]
    for _ in range(args.layers):
        rows.append(rows[-1] + 0.3 * torch.randn(args.samples, args.dim))
    pairs = list(pairwise(rows))

    gram, gram_flops, ours = measure(lambda: consecutive_cka(rows), args.repeats)
    feature, feature_flops, theirs = measure(lambda: [feature_space(x, y) for x, y in pairs], args.repeats)
    weights = torch.ones(200, args.samples)
    boot, boot_flops, _ = measure(lambda: consecutive_cka(rows, debiased=True, weights_bn=weights), args.repeats)
    difference = max(abs(a - b) for a, b in zip(ours.tolist(), theirs, strict=True))

    print(f"d = {args.dim}, n = {args.samples}, {args.layers} layers, {torch.get_num_threads()} threads")
    print("| form | seconds (best) | GFLOP |\n|---|---|---|")
    print(f"| sample space, float64 | {min(gram):.3f} | {gram_flops / 1e9:.1f} |")
    print(f"| sample space, debiased, 200 bootstrap draws, float64 | {min(boot):.3f} | {boot_flops / 1e9:.1f} |")
    print(f"| feature space, float32 | {min(feature):.3f} | {feature_flops / 1e9:.1f} |")
    print(f"time {min(feature) / min(gram):.1f} x, FLOPs {feature_flops / gram_flops:.1f} x")
    print(f"largest difference of a CKA value {difference:.1e}")


if __name__ == "__main__":
    main()
