#!/usr/bin/env bash
# upper.yaml in one command:
#   bash recipes/ablation/upper.sh MODEL_FOLDER LLM_ADAPTERS_FOLDER OUTPUT [options of `echo-trainer ablate`]
# Goes on where it stopped when it is called again. CPU, offline.
set -euo pipefail
usage="usage: $(basename "$0") MODEL_FOLDER LLM_ADAPTERS_FOLDER OUTPUT [options]"
export MODEL=${1:?$usage}
files=${2:?$usage} output=${3:?$usage}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export DATA=$output/data OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
shift 3
[[ -f $DATA/train.jsonl ]] || python "$here/questions.py" "$files/social_i_qa-test.json" --out "$DATA"
python -m echo_trainer.cli ablate "$here/upper.yaml" --output "$output" --threads 1 "$@"
