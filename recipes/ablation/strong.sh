#!/usr/bin/env bash
# strong.yaml in one command: bash recipes/ablation/strong.sh OUTPUT [options of `echo-trainer ablate`]
# Goes on where it stopped when it is called again. CPU, offline.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/stories.sh" "$@"
shift
# Each seed draws its 384 examples from 6,000.
python -m echo_trainer.cli ablate "$here/strong.yaml" --output "$output" --threads 1 "$@"
