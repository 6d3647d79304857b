#!/usr/bin/env bash
# Runs any recipe in a job with one component. Each task is a rank. Everything after the script's name goes to Hydra.
#
#   sbatch --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 slurm/train.sh recipe=demo cluster=slurm_h100 parallel=tp8_sp
#   sbatch --nodes=1 --ntasks-per-node=2 --cpus-per-task=2 slurm/train.sh recipe=demo           # CPU nodes
#
# Add --exclusive --mem=0 for complete nodes. The repository must be on a file system that all nodes share.
# docs/slurm.md is the introduction.
#SBATCH --job-name=safework
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue --signal=B:USR1@900
script=$(scontrol show job --oneliner "$SLURM_JOB_ID" | sed -n '1s/.* Command=\([^ ]*\).*/\1/p') # Slurm runs a copy of it
cd "$(dirname "$script")/.."
source slurm/library.sh
run_job "$@"
