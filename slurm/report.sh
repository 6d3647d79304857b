#!/usr/bin/env bash
# ladder.json and report.html of a ladder's stages that are there; slurm/ladder.sh submits it last:
#
#   sbatch slurm/report.sh runs/safework_72b
#SBATCH --job-name=report --output=slurm-%j.log
#SBATCH --nodes=1 --ntasks-per-node=1
set -euo pipefail
source slurm/library.sh
read_site
read_job
read_container
once -m recipes.launch.pipeline "${1:?which folder, such as runs/safework_72b}"
