#!/usr/bin/env bash
# labels.yaml in one command: bash recipes/ablation/labels.sh OUTPUT [options of `echo-trainer ablate`]
# Goes on where it stopped when it is called again. CPU, offline.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/stories.sh" "$@"
shift
python -m echo_trainer.cli ablate "$here/labels.yaml" --output "$output" --threads 1 "$@"
