#!/usr/bin/env bash
# The ladder as one job a stage, each after the one before: `slurm/ladder.sh slurm/safework_72b.sh [overrides…]`.
# It prints the jobs' numbers. A stage that fails takes those behind it out of the queue; then, or at the end, a small job
# writes the ladder's report. STAGES="rl_safety rl_search" names other stages than conf/stage/ladder.yaml. sbatch's options
# go into its own variables (SBATCH_PARTITION, …: slurm/sites/template.sh).
set -euo pipefail
source slurm/library.sh
script=${1:?which script, such as slurm/safework_72b.sh}
read_arguments "${@:2}"
size=()
if [[ -n $nodes ]]; then
  size=(--nodes="$nodes")
  if grep -q '^#SBATCH hetjob' "$script"; then size+=(:); fi # the trainer's component alone
fi
recipe=$(sed -n 's/^run_job .*recipe=\([^ ]*\).*/\1/p' "$script")
for argument in "${hydra[@]}"; do
  [[ $argument != recipe=* ]] || recipe=${argument#*=}
done
previous=()
for stage in ${STAGES:-$(sed -n 's/^stage: .*ladder: \[\(.*\)\].*/\1/p' conf/stage/ladder.yaml | tr -d ,)}; do
  job=$(sbatch --parsable --kill-on-invalid-dep=yes "${previous[@]}" "${size[@]}" "$script" "stage=$stage" "${@:2}")
  echo "$stage: job $job"
  previous=(--dependency="afterok:$job")
done
job=$(sbatch --parsable --dependency="afterany:$job" slurm/report.sh "runs/$recipe")
echo "report: job $job"
