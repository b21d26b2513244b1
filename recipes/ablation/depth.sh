#!/usr/bin/env bash
# depth.yaml for each cell of the grid: bash recipes/ablation/depth.sh OUTPUT [options of `echo-trainer ablate`]
# CELLS="SHARE:EXAMPLES:STEPS ..." runs some of them. Goes on where it stopped when it is called again. CPU, offline.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/stories.sh" "$@"
shift
cells=${CELLS:-0.5:96:200 1.0:96:200 0.5:384:200 1.0:384:200 0.5:3000:600 1.0:3000:600}
for cell in $cells; do
    IFS=: read -r SHARE EXAMPLES STEPS <<< "$cell"
    export SHARE EXAMPLES STEPS
    echo "== the upper $SHARE of the layers, $EXAMPLES examples, $STEPS steps"
    python -m echo_trainer.cli ablate "$here/depth.yaml" --output "$output/layers-$SHARE-examples-$EXAMPLES" --threads 1 "$@"
done
