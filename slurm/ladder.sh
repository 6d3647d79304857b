#!/usr/bin/env bash
# Submits the stages of the ladder, a job each, which starts when the job before it has succeeded:
#
#   slurm/ladder.sh slurm/safework_72b.sh [overrides…]
#
# It prints the numbers of the jobs. When a stage fails, Slurm cancels the jobs after it; then, or at the end, a small job
# writes the report of all stages. STAGES="rl_safety rl_search" names other stages than conf/stage/ladder.yaml. Options of
# sbatch go into its own variables (SBATCH_PARTITION, …: slurm/sites/template.sh).
script=$(realpath "${1:?which script, such as slurm/safework_72b.sh}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/library.sh
# What the script itself gives to the run comes before what is given here.
of_script=$(sed -n 's/^run_job \(.*\) "\$@"$/\1/p' "$script")
read -ra of_script <<< "$of_script"
read_arguments "${of_script[@]}" "${@:2}"
size=()
if [[ -n $nodes ]]; then
  size=(--nodes=$((nodes + engine_nodes)))
  # --nodes is of the trainer's component alone
  if grep -q '^#SBATCH hetjob' "$script"; then size+=(:); fi
fi
recipe=''
for argument in "${hydra[@]}"; do
  [[ $argument != recipe=* ]] || recipe=${argument#*=}
done
previous=()
stages=${STAGES:-$(sed -n 's/^stage: .*ladder: \[\(.*\)\].*/\1/p' conf/stage/ladder.yaml | tr -d ,)}
for stage in $stages; do
  arguments=()
  for argument in "${@:2}"; do
    # A stage that has not begun has nothing to go on from.
    [[ $argument == resume=true && ! -e runs/$recipe/$stage/run.json ]] || arguments+=("$argument")
  done
  job=$(sbatch --parsable --kill-on-invalid-dep=yes "${previous[@]}" "${size[@]}" "$script" "stage=$stage" "${arguments[@]}")
  echo "$stage: job $job"
  previous=(--dependency="afterok:$job")
done
job=$(sbatch --parsable --dependency="afterany:$job" slurm/report.sh "runs/$recipe")
echo "report: job $job"
