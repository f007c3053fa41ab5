#!/usr/bin/env bash
# Tune on one NVIDIA GPU and sample the config's prompts. Needs a driver for CUDA 12 or newer.
#   bash launch/one_gpu.sh configs/man-skiing.yaml [key=value ...]
# Uses the first GPU, or the one that CUDA_VISIBLE_DEVICES names. The installation takes some
# minutes; the config's header says how long the run takes.
# SIGTERM saves a checkpoint and ends the script with status 143; the same command goes on from there.
# On a machine that is taken away and comes back, let a startup script run it.
set -euo pipefail
cd "$(dirname "$0")/.."

export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"
python3 -m venv .venv
.venv/bin/pip install --quiet --editable '.[cuda12]'
exec .venv/bin/python -m tav_jax.tune --config "$@"
