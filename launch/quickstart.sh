#!/usr/bin/env bash
# Sets everything up and runs the whole method once, on any machine with Python 3.11 or newer:
# about three minutes on two CPU cores, most of them compiling, and 1 GB of memory.
#   bash launch/quickstart.sh
# The model is tests/golden/base, whose weights are random: the run is real, its pictures are not.
set -euo pipefail
cd "$(dirname "$0")/.."

python3 -m venv .venv
.venv/bin/pip install --quiet --editable .
.venv/bin/python -m tav_jax.tune --config configs/quickstart.yaml
.venv/bin/python -m tav_jax.sample --run outputs/quickstart --prompt "a green ball is rolling"
