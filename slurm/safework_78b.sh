#!/usr/bin/env bash
# recipe=safework_78b on 8 nodes of 8 H100, its judges on 3 more. Everything behind the script goes to Hydra:
#
#   sbatch slurm/safework_78b.sh algorithm=cpgd stage=rl_safety
#   sbatch slurm/safework_78b.sh cluster.nodes=16      # or, without a second wait in the queue:
#   sbatch --nodes=16 : slurm/safework_78b.sh          # before the colon: of the trainer's component alone
#SBATCH --job-name=safework_78b --output=slurm-%j.log --open-mode=append
#SBATCH --requeue --signal=B:USR1@900
#SBATCH --nodes=8 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8
#SBATCH hetjob
#SBATCH --nodes=3 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64
set -euo pipefail
source slurm/library.sh
run_job recipe=safework_78b "$@"
