#!/usr/bin/env bash
# Tunes on the GPUs of several nodes under SLURM, and samples the config's prompts.
#   sbatch launch/slurm.sh configs/man-skiing.yaml [key=value ...]
#   sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 launch/slurm.sh ...
# From the project's folder, which all nodes share, with an environment made before:
#   python3 -m venv .venv && .venv/bin/pip install --editable '.[cuda12]'
# As many frames as the GPUs divide. Not timed: no cluster was at hand. After a node has failed,
# SLURM starts the job again, and it goes on from its last checkpoint.
#SBATCH --job-name=tav_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --time=02:00:00
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?is not set: start this by sbatch}"

# A process for each GPU: all on a node see its GPUs, and JAX gives each the one of its number.
srun --kill-on-bad-exit=1 .venv/bin/python -m tav_jax.tune --config "$@"
