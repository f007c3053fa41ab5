#!/usr/bin/env bash
# Sample a plan of runs, prompts and seeds on all GPUs that SLURM gives, on any nodes.
#   sbatch launch/slurm_batch.sh plan.yaml [--batch-size 4]
#   sbatch --ntasks=64 launch/slurm_batch.sh plan.yaml
# Submit it from the project's folder, which all nodes must share. Make the environment before:
#   python3 -m venv .venv && .venv/bin/pip install --editable '.[cuda12]'
# `python -m tav_jax.batch --help` describes the plan's format. The workers share the plan and need
# not start or end together. Several such jobs may run at once; a second run makes what is missing.
# Time: the videos, times that of one, by the number of GPUs. If that is more than the job has, it is
# queued again and makes what is missing.
#SBATCH --job-name=tav_jax-batch
#SBATCH --ntasks=8
#SBATCH --gpus-per-task=1
#SBATCH --time=02:00:00
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@60
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?is not set: start this by sbatch}"

# When one fails the others do its part.
status=0
srun --kill-on-bad-exit=0 .venv/bin/python launch/batch_sample.py "$@" || status=$?

# Asked to stop, by SLURM before the time is over or by a preemption: go on when there is room.
if [[ $status == 143 ]]; then
    scontrol requeue "${SLURM_JOB_ID:?}"
fi
exit "$status"
