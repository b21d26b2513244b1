#!/usr/bin/env bash
# The ablation on SmolLM2-135M-Instruct on one GPU: 8 arms, 5 seeds, several runs at once. Call it again to continue.
# usage: bash recipes/ablation/gpu.sh MODEL_FOLDER DATA_FOLDER [OUTPUT_FOLDER] [JOBS] [more options of echo-trainer ablate]
set -euo pipefail
if [ $# -lt 2 ]; then sed -n 2,3p "$0" >&2; exit 2; fi
export MODEL=$1 DATA=$2
out=${3:-runs/ablation-smollm2}; jobs=${4:-8}
shift $(( $# < 4 ? $# : 4 ))
echo-trainer ablate ablation/smollm2 --output "$out" --jobs "$jobs" "$@"
