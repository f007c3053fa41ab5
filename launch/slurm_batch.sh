#!/usr/bin/env bash
# Samples a plan of runs, prompts and seeds on as many GPUs as SLURM gives, wherever they are.
#   sbatch launch/slurm_batch.sh plan.yaml [--batch-size 4]
#   sbatch --ntasks=64 launch/slurm_batch.sh plan.yaml
# From the project's folder, which all nodes share, with an environment made before:
#   python3 -m venv .venv && .venv/bin/pip install --editable '.[cuda12]'
# The plan's form stands at the top of launch/batch_sample.py. The workers share the plan and need
# not start or end together: more of these jobs may run at once, and run again they do what is left.
# Time: the videos, times that of one, by the number of GPUs.
#SBATCH --job-name=tav_jax-batch
#SBATCH --ntasks=8
#SBATCH --gpus-per-task=1
#SBATCH --time=02:00:00
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?is not set: start this by sbatch}"

# When one fails the others do its part.
srun --kill-on-bad-exit=0 .venv/bin/python launch/batch_sample.py "$@"
