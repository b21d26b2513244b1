#!/usr/bin/env bash
# The table of README.md for one GPU: 7B and 8B shapes, random weights, bfloat16. About 10 minutes on an 80 GB card.
# usage: bash recipes/benchmarks/gpu.sh [OUTPUT_FOLDER] [BATCH_SHORT] [BATCH_LONG]
set -euo pipefail
out=${1:-runs/benchmarks}; short=${2:-48}; long=${3:-12}
for shape in llama-7b llama3-8b; do
  for checkpointing in "" "--checkpointing"; do
    name="$out/$shape${checkpointing:+-checkpointing}"
    echo-trainer bench --shape $shape --dtype bfloat16 --prompt 256 --answer 16 --batch "$short" --rounds 8 \
      $checkpointing --output "$name-256-16"
    echo-trainer bench --shape $shape --dtype bfloat16 --prompt 512 --answer 512 --batch "$long" --rounds 8 \
      $checkpointing --output "$name-512-512"
  done
done
