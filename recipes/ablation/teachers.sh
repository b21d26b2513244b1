#!/usr/bin/env bash
# teachers.py in one command: bash recipes/ablation/teachers.sh OUTPUT [options of teachers.py]
# Goes on where it stopped when it is called again. CPU, offline.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/stories.sh" "$@"
shift
python "$here/teachers.py" "$output" "$@"
