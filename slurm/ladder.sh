#!/usr/bin/env bash
# Submits one job for each stage of the ladder. A job starts when the job before it has succeeded:
#
#   slurm/ladder.sh slurm/safework_72b.sh [overrides…]
#
# It prints the job ids. When a stage fails, Slurm cancels the jobs after it. After a failure, or after the last stage,
# a small job writes the report of all stages. STAGES="rl_safety rl_search" replaces the stages of
# conf/stage/ladder.yaml. Set sbatch's options through its own variables (SBATCH_PARTITION, …: slurm/sites/template.sh).
#
# A stage that continues an earlier one starts from that stage's model in runs/RECIPE. model.path is for the others.
script=$(realpath "${1:?which script, such as slurm/safework_72b.sh}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/library.sh
# The script's own arguments to the run come before those given here.
of_script=$(sed -n 's/^run_job \(.*\) "\$@"$/\1/p' "$script")
read -ra of_script <<< "$of_script"
read_arguments "${of_script[@]}" "${@:2}"
size=()
if [[ -n $nodes ]]; then
  size=(--nodes=$((nodes + engine_nodes)))
  # --nodes applies to the trainer's component only
  if grep -q '^#SBATCH hetjob' "$script"; then size+=(:); fi
fi
recipe=''
for argument in "${hydra[@]}"; do
  [[ $argument != recipe=* ]] || recipe=${argument#*=}
  [[ $argument != run_dir=* ]] || stop "$argument: a ladder's stages have the folders runs/RECIPE/STAGE; leave run_dir out"
done
dependency=()
policy='' # the latest earlier stage that trains a policy
stages=${STAGES:-$(sed -n 's/^stage: .*ladder: \[\(.*\)\].*/\1/p' conf/stage/ladder.yaml | tr -d ,)}
for stage in $stages; do
  after=$(sed -n 's/^stage: .*after: \([a-z_]*\).*/\1/p' "conf/stage/$stage.yaml")
  [[ -z $after ]] || after=${policy:-$after}
  arguments=()
  for argument in "${@:2}"; do
    case $argument in
      resume=true) [[ ! -e runs/$recipe/$stage/run.json ]] || arguments+=("$argument") ;; # else there is nothing to resume
      model.path=*) [[ -n $after ]] || arguments+=("$argument") ;;
      *) arguments+=("$argument") ;;
    esac
  done
  [[ -z $after ]] || arguments+=("stage.after=$after" "model.path=runs/$recipe/$after/hf")
  job=$(sbatch --parsable --kill-on-invalid-dep=yes "${dependency[@]}" "${size[@]}" "$script" "stage=$stage" "${arguments[@]}")
  echo "$stage: job $job"
  dependency=(--dependency="afterok:$job")
  grep -q '^stage: .*evaluates: false' "conf/stage/$stage.yaml" || policy=$stage
done
job=$(sbatch --parsable --dependency="afterany:$job" slurm/report.sh "runs/$recipe")
echo "report: job $job"
