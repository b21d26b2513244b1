#!/usr/bin/env bash
# latent.yaml in one command: bash recipes/ablation/latent.sh OUTPUT [options of `echo-trainer ablate`]
# Goes on where it stopped when it is called again. CPU, offline.
set -euo pipefail
STORIES=--latent
source "$(dirname "${BASH_SOURCE[0]}")/stories.sh" "$@"
shift
python -m echo_trainer.cli ablate "$here/latent.yaml" --output "$output" --threads 1 "$@"
