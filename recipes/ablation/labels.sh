#!/usr/bin/env bash
# labels.yaml in one command: bash recipes/ablation/labels.sh OUTPUT [options of `echo-trainer ablate`]
# CELLS="SHARE:EXAMPLES:STEPS:RATES ..." runs other cells of the grid, each in a folder of its own, RATES as "1e-3,2e-3".
# Goes on where it stopped when it is called again. CPU, offline.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/stories.sh" "$@"
shift
ablate() { python -m echo_trainer.cli ablate "$here/labels.yaml" --threads 1 "$@"; }
if [[ -z ${CELLS:-} ]]; then
    ablate --output "$output" "$@"
    exit
fi
for cell in $CELLS; do
    IFS=: read -r SHARE EXAMPLES STEPS RATES <<< "$cell"
    export SHARE EXAMPLES STEPS
    echo "== the upper $SHARE of the layers, $EXAMPLES examples, $STEPS steps"
    # shellcheck disable=SC2086 # one word for each rate
    ablate --output "$output/layers-$SHARE-examples-$EXAMPLES" --learning_rates ${RATES//,/ } "$@"
done
