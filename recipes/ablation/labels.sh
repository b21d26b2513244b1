#!/usr/bin/env bash
# labels.yaml in one command: bash recipes/ablation/labels.sh OUTPUT [options of `echo-trainer ablate`]
# Goes on where it stopped when it is called again. CPU, offline.
set -euo pipefail
output=${1:?usage: labels.sh OUTPUT [options]}
shift
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export DATA=$output/data OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# As strong.sh makes them: stories without events, other ones than the quickstart's.
if [[ ! -f $DATA/train.jsonl ]]; then
    python "$here/../quickstart/make_data.py" --out "$DATA" --seed 71 --train 6200 --test 800 --events 0 0
fi
python -m echo_trainer.cli ablate "$here/labels.yaml" --output "$output" --threads 1 "$@"
