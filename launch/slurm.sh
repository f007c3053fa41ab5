#!/usr/bin/env bash
# Tune on the GPUs of several nodes under SLURM, and sample the config's prompts.
#   sbatch launch/slurm.sh configs/man-skiing.yaml [key=value ...]
#   sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 launch/slurm.sh ...
# Submit it from the project's folder, which all nodes must share. Make the environment before:
#   python3 -m venv .venv && .venv/bin/pip install --editable '.[cuda12]'
# The GPUs must divide the number of frames. Never timed on a cluster. Two minutes before the time
# limit the run saves a checkpoint and the job is queued again. After a node has failed, SLURM
# restarts it. Either way the run resumes from its last checkpoint.
#SBATCH --job-name=tav_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --time=02:00:00
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?is not set: start this by sbatch}"

# A process for each GPU: all on a node see its GPUs, and JAX gives each the one of its number.
status=0
srun --kill-on-bad-exit=1 .venv/bin/python -m tav_jax.tune --config "$@" || status=$?

# Asked to stop, by SLURM before the time is over or by a preemption: go on when there is room.
if [[ $status == 143 ]]; then
    scontrol requeue "${SLURM_JOB_ID:?}"
fi
exit "$status"
