#!/usr/bin/env bash
# Tunes on one NVIDIA GPU and samples the config's prompts. Needs a driver for CUDA 12 or newer.
#   bash launch/one_gpu.sh configs/man-skiing.yaml [key=value ...]
# The first of several, or that which CUDA_VISIBLE_DEVICES names. Time as the config's header says,
# after an installation of some minutes.
set -euo pipefail
cd "$(dirname "$0")/.."

export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"
python3 -m venv .venv
.venv/bin/pip install --quiet --editable '.[cuda12]'
.venv/bin/python -m tav_jax.tune --config "$@"
