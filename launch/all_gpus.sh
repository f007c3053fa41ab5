#!/usr/bin/env bash
# Tunes on all NVIDIA GPUs of this host, the clip's frames spread over them, and samples the
# config's prompts. Needs a driver for CUDA 12 or newer, and as many frames as the GPUs divide.
#   bash launch/all_gpus.sh configs/man-skiing.yaml [key=value ...]
# One process has them all. mesh.data=2 or mesh.fsdp=2 spreads the work in other ways too;
# CUDA_VISIBLE_DEVICES=0,1 leaves some GPUs out. Not timed: no such host was at hand.
set -euo pipefail
cd "$(dirname "$0")/.."

python3 -m venv .venv
.venv/bin/pip install --quiet --editable '.[cuda12]'
.venv/bin/python -m tav_jax.tune --config "$@"
