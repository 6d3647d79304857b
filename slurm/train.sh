#!/usr/bin/env bash
# The run of `python -m recipes.train …` on a cluster: one task is one rank. Everything behind the script goes to Hydra.
#
#   sbatch --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 slurm/train.sh recipe=demo cluster=slurm_h100 parallel=tp8_sp
#   sbatch --nodes=1 --ntasks-per-node=2 --cpus-per-task=2 slurm/train.sh recipe=demo           # CPU nodes
#
# Submit from the repository's root, on a file system that all nodes share, with .venv made by `make env`.
#SBATCH --job-name=safework
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
set -euo pipefail

: "${SLURM_NTASKS:?give --ntasks-per-node (ranks per node) to sbatch}"
python=.venv/bin/python
arguments=("$@" "cluster.ranks=$SLURM_NTASKS")

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p) # head would break the pipe
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000)) # below the range that the kernel hands out
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}

"$python" -m recipes.prepare "${arguments[@]}"

# Tasks are not bound to cores: the engines are children of rank 0 and use the whole node. One dead rank ends the step, and
# the script's exit code is the step's.
exec srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --cpu-bind=none --kill-on-bad-exit=1 --wait=60 \
  "$python" -m recipes.train "${arguments[@]}"
