#!/usr/bin/env bash
# Train under every engine with two processes and compare with one process: tests/run/test_processes.py on this machine.
#
#   bash recipes/accelerate/check.sh
#
# On two GPUs if there are as many, else with gloo processes on the CPU. ZeRO is skipped, by name, without deepspeed.
set -euo pipefail
cd "$(dirname "$0")/../.."
if [ "$(python -c 'import torch; print(torch.cuda.device_count())')" -ge 2 ]; then
  export ECHO_PROCESSES_ON=gpu
else
  echo "fewer than two GPUs here: gloo processes on the CPU"
fi
python -m pytest -q -rs tests/run/test_processes.py -m "long or not long" -k "ddp-2 or fsdp2-2 or zero2-2 or zero3-2" "$@"
