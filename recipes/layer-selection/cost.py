"""What CKA of all neighbouring layers costs: sample space (ours, float64) against feature space (published, float32).

Needs: 1 GB of memory; about two minutes on one core. Expect: the table of this folder's README.

    python recipes/layer-selection/cost.py --dim 4096 --samples 128 --layers 32
"""

import argparse
import time
from itertools import pairwise

import torch
from torch.utils.flop_counter import FlopCounterMode

from echo_trainer.selection.cka import consecutive_cka


def feature_space(x_nd: torch.Tensor, y_nd: torch.Tensor) -> float:
    """||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F) of column-centred X, Y: three d x d products for each pair."""
    x, y = x_nd - x_nd.mean(0), y_nd - y_nd.mean(0)
    return float((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


def count_flops(function) -> tuple[int, object]:
    with FlopCounterMode(display=False) as counter:
        value = function()
    return counter.get_total_flops(), value


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

    weights = torch.ones(200, args.samples)
    forms = {
        "sample space, float64": lambda: consecutive_cka(rows).tolist(),
        "sample space, debiased, 200 bootstrap draws, float64": lambda: consecutive_cka(
            rows, debiased=True, weights_bn=weights
        ),
        "feature space, float32": lambda: [feature_space(x, y) for x, y in pairs],
    }
    counted = {name: count_flops(form) for name, form in forms.items()}
    seconds = {name: [] for name in forms}
    for _ in range(args.repeats):  # in turns, so that a busy machine slows all forms alike
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            seconds[name].append(time.perf_counter() - start)

    print(f"d = {args.dim}, n = {args.samples}, {args.layers} layers, {torch.get_num_threads()} threads")
    print("| form | seconds (best) | GFLOP |\n|---|---|---|")
    for name in forms:
        print(f"| {name} | {min(seconds[name]):.3f} | {counted[name][0] / 1e9:.1f} |")
    ours, _, published = forms
    turns = [b / a for a, b in zip(seconds[ours], seconds[published], strict=True)]
    flops = counted[published][0] / counted[ours][0]
    print(f"time {min(turns):.1f} to {max(turns):.1f} x within a turn, FLOPs {flops:.1f} x")
    difference = max(abs(a - b) for a, b in zip(counted[ours][1], counted[published][1], strict=True))
    print(f"largest difference of a CKA value {difference:.1e}")


if __name__ == "__main__":
    main()
