#!/usr/bin/env bash
# Writes ladder.json and report.html of the stages that have run. slurm/ladder.sh submits this job last:
#
#   sbatch slurm/report.sh runs/safework_72b
#SBATCH --job-name=report --output=slurm-%j.log
#SBATCH --nodes=1 --ntasks-per-node=1
script=$(scontrol show job --oneliner "$SLURM_JOB_ID" | sed -n '1s/.* Command=\([^ ]*\).*/\1/p') # Slurm runs a copy of it
cd "$(dirname "$script")/.."
source slurm/library.sh
read_site
read_job
read_container
run_once -m recipes.launch.pipeline "${1:?which folder, such as runs/safework_72b}"
