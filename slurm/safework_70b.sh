#!/usr/bin/env bash
# recipe=safework_70b on 8 nodes of 8 H100, reward servers on 2 more. slurm/library.sh shows how to submit it.
#SBATCH --job-name=safework_70b --output=slurm-%j.log --open-mode=append --requeue --signal=B:USR1@900
#SBATCH --nodes=8 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 --exclusive --mem=0
#SBATCH hetjob
#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64 --exclusive --mem=0
script=$(scontrol show job --oneliner "$SLURM_JOB_ID" | sed -n '1s/.* Command=\([^ ]*\).*/\1/p') # Slurm runs a copy of it
cd "$(dirname "$script")/.."
source slurm/library.sh
run_job recipe=safework_70b "$@"
