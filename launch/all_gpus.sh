#!/usr/bin/env bash
# Tune on all NVIDIA GPUs of this host and sample the config's prompts. The clip's frames are spread
# over the GPUs. Needs a driver for CUDA 12 or newer, and a number of frames that the GPUs divide.
#   bash launch/all_gpus.sh configs/man-skiing.yaml [key=value ...]
# One process uses all GPUs. mesh.data=2 or mesh.fsdp=2 spreads the work in other ways;
# CUDA_VISIBLE_DEVICES=0,1 selects GPUs. Never run on such a host, so there is no time to state.
# SIGTERM saves a checkpoint and ends the script with status 143; the same command goes on from there.
# On a machine that is taken away and comes back, let a startup script run it.
set -euo pipefail
cd "$(dirname "$0")/.."

python3 -m venv .venv
.venv/bin/pip install --quiet --editable '.[cuda12]'
exec .venv/bin/python -m tav_jax.tune --config "$@"
