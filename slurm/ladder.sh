#!/usr/bin/env bash
# The ladder as one job a stage, each after the one before: `slurm/ladder.sh slurm/safework_72b.sh [overrides…]`.
# It prints the jobs' numbers. A stage that fails takes those behind it out of the queue. STAGES="rl_safety rl_search" names
# other stages. sbatch's options go into its own variables (SBATCH_PARTITION, …: slurm/sites/template.sh).
set -euo pipefail
source slurm/library.sh
script=${1:?which script, such as slurm/safework_72b.sh}
read_arguments "${@:2}"
size=()
if [[ -n $nodes ]]; then
  size=(--nodes="$nodes")
  if grep -q '^#SBATCH hetjob' "$script"; then size+=(:); fi # the trainer's component alone
fi
previous=()
for stage in ${STAGES:-sft rl_general rl_safety rl_efficient rl_search}; do
  job=$(sbatch --parsable --kill-on-invalid-dep=yes "${previous[@]}" "${size[@]}" "$script" "stage=$stage" "${@:2}")
  echo "$stage: job $job"
  previous=(--dependency="afterok:$job")
done
