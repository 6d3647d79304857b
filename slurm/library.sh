# shellcheck shell=bash
# What the job scripts share. Sourced from the repository's root; `run_job recipe=NAME "$@"` is the whole job: the
# preflight, reward servers where the recipe needs them, and one task per rank. The exit code is the first that failed; a
# job that is worth it begins again by itself, and resumes (finish).
#
# A heterogeneous job has the ranks in component 0 and the servers in component 1; in a job of one component the servers
# share its nodes. A site's variables are in slurm/sites/template.sh.
set -euo pipefail

stop() {
  echo "error: $*" >&2
  exit 1
}

read_site() {
  # shellcheck disable=SC1090  # the site's own file
  [[ -z ${SITE_FILE:-} ]] || source "$SITE_FILE"
}

# Sorts the command line into hydra (for every program), checks (the preflight's own) and nodes (cluster.nodes).
read_arguments() {
  hydra=() checks=() nodes=
  local argument flags=()
  for argument in "$@"; do
    case $argument in
      --*) flags+=("$argument") ;; # Hydra wants overrides in one row
      preflight=* | preflight.*) checks+=("$argument") ;;
      cluster.nodes=*) nodes=${argument#*=} ;;
      *) hydra+=("$argument") ;;
    esac
  done
  hydra=(${flags[@]+"${flags[@]}"} "${hydra[@]}")
}

# Sets what Slurm gave us: hosts, tasks and GPUs of the trainer, and where servers go.
read_job() {
  per_node=${SLURM_NTASKS_PER_NODE_HET_GROUP_0:-${SLURM_NTASKS_PER_NODE:?give --ntasks-per-node (ranks per node) to sbatch}}
  tasks=$((per_node * SLURM_JOB_NUM_NODES))
  gpus=${SLURM_GPUS_PER_NODE:-0}
  cpus=${SLURM_CPUS_PER_TASK:-1}
  trainer=() rewards=(--overlap)
  server_job=$SLURM_JOB_ID
  server_nodes=$SLURM_JOB_NODELIST
  first_free=$per_node
  if [[ -n ${SLURM_HET_SIZE:-} ]]; then
    cpus=${SLURM_CPUS_PER_TASK_HET_GROUP_0:-1}
    gpus=${SLURM_GPUS_PER_NODE_HET_GROUP_1:-0}
    trainer=(--het-group=0) rewards=(--het-group=1)
    server_job=$SLURM_JOB_ID_HET_GROUP_1
    server_nodes=$SLURM_JOB_NODELIST_HET_GROUP_1
    first_free=0
  fi
  gpus=${gpus##*:} # of h100:8
  server_hosts=$(scontrol show hostnames "$server_nodes" | paste -sd' ')

  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p) # head would break the pipe
  MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))                            # below the range that the kernel hands out
  OMP_NUM_THREADS=$cpus
  export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS
}

# A job that Slurm has started again resumes what its earlier start prepared; what an older job left in the run's folder is
# not resumed. The file's time is that of the last start of ranks.
read_restarts() {
  restarts=${SLURM_RESTART_COUNT:-0} most=${MAX_RESTARTS:-20}
  prepared=slurm-$SLURM_JOB_ID.prepared
  ((restarts <= most)) || stop "the job was started again $restarts times, MAX_RESTARTS=$most"
  if ((restarts == 0)); then
    rm -f "$prepared"
  elif [[ -e $prepared ]]; then
    hydra+=(resume=true)
    echo "started again ($restarts of at most $most times): resumes"
  fi
}

# The nodes are given before Hydra reads anything. A job with other nodes than cluster.nodes submits itself again, with its
# trainer's tasks, CPUs, GPUs and partition, and is cancelled, so that what depends on it does not start.
resubmit() {
  local script name job=$SLURM_JOB_ID colon=${SLURM_HET_SIZE:+:}
  local gpus=${SLURM_GPUS_PER_NODE_HET_GROUP_0:-${SLURM_GPUS_PER_NODE:-}}
  local size=(--nodes="$nodes" --ntasks-per-node="$per_node" --cpus-per-task="$cpus")
  size+=(--partition="$SLURM_JOB_PARTITION" ${gpus:+--gpus-per-node="$gpus"})
  script=$(scontrol show job --oneliner "$SLURM_JOB_ID" | grep -o ' Command=[^ ]*' | sed -n '1s/ Command=//p')
  echo "cluster.nodes=$nodes, the job has $SLURM_JOB_NUM_NODES: submitted again (sbatch --nodes=$nodes saves this)"
  for name in $(compgen -e SLURM_); do # of this job, which the next would inherit
    [[ $name == SLURM_CONF ]] || unset "$name"
  done
  sbatch "${size[@]}" ${colon:+"$colon"} "$script" "$@"
  scancel "$job"
  sleep 60 # until Slurm ends us
}

# Sets python (the command) and in_container (srun's options) from the one variable CONTAINER.
read_container() {
  python=(.venv/bin/python) in_container=()
  local mounts=$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
  case ${CONTAINER:-} in
    "") ;;
    apptainer:* | singularity:*)
      python=("${CONTAINER%%:*}" exec --nv --bind "$mounts" --pwd "$PWD" "${CONTAINER#*:}" python3)
      ;;
    pyxis:*)
      python=(python3)
      in_container=(--container-image="${CONTAINER#*:}" --container-workdir="$PWD")
      in_container+=(--container-mounts="$(sed -E 's/[^,:]+/&:&/g' <<< "$mounts")")
      ;;
    *) stop "CONTAINER=$CONTAINER: use apptainer:IMAGE, singularity:IMAGE or pyxis:IMAGE, or nothing for .venv" ;;
  esac
}

# One process on the trainer's first node.
once() {
  srun "${trainer[@]}" --nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task="$cpus" --cpu-bind=none \
    "${in_container[@]}" "${python[@]}" "$@"
}

# Whether http://HOST:PORT/health says 200.
healthy() {
  local host=${1#http://}
  # shellcheck disable=SC2016  # the inner shell expands it
  timeout 5 bash -c 'exec 3<> "/dev/tcp/$1/$2" && printf "GET /health HTTP/1.0\r\n\r\n" >&3 && read -r _ code _ <&3 &&
    [[ $code == 200 ]]' bash "${host%:*}" "${host##*:}" 2> /dev/null
}

# Starts the servers that the recipe needs, waits until they answer, and tells the trainer where they are.
start_servers() {
  local plan host words timeout addresses address pid
  plan=$(once -m rewards.placement "${server_hosts// /,}" "$first_free" "$gpus" "${hydra[@]}")
  [[ -n $plan ]] || return 0
  REWARDS_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n') # in the environment: command lines can be read by others
  export REWARDS_TOKEN
  while read -r host words; do
    read -ra words <<< "$words"
    srun "${rewards[@]}" --job-name=rewards --nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist="$host" \
      --cpu-bind=none "${in_container[@]}" "${python[@]}" -m rewards.serve "${hydra[@]}" "${words[@]}" &
    servers+=($!)
  done < <(tail -n +3 <<< "$plan")
  read -r timeout addresses <<< "$(sed -n 2p <<< "$plan")"
  timeout=$((SECONDS + timeout))
  for address in $addresses; do
    until healthy "$address"; do
      for pid in "${servers[@]}"; do
        kill -0 "$pid" 2> /dev/null || stop "reward servers ended before $address answered; see <run_dir>/servers"
      done
      ((SECONDS < timeout)) || stop "$address does not answer $(hostname) within rewards.supervisor.startup_timeout"
      sleep 1
    done
  done
  read -ra words <<< "$(sed -n 1p <<< "$plan")"
  hydra+=("${words[@]}")
}

# Ends the servers in order: SIGTERM to their steps, since a signal to srun would kill them.
stop_servers() {
  local steps
  ((${#servers[@]})) || return 0
  steps=$(squeue --noheader --steps --jobs="$server_job" --format='%i %j' | sed -n 's/ rewards$//p')
  # shellcheck disable=SC2086  # one word a step
  [[ -z $steps ]] || scancel --signal=TERM $steps || true # one that ends at this moment is an error for it
  wait "${servers[@]}" || true
}

# On SIGUSR1, by which Slurm says that the job has to end soon: a run that has begun is told, and saves. A timer runs from
# then on.
hear() {
  if [[ -z ${training:-} ]]; then
    echo "told to end before training began, which is not heeded: --time must be more than --signal's seconds"
    return
  fi
  echo "told to end by Slurm: the run saves its step"
  if [[ -z $timer ]]; then
    most_of_the_time_left &
    timer=$!
  fi
  kill -USR1 "$training" 2> /dev/null || true # srun passes it on
}

# Ends when nine tenths of the time are over that the job has left.
most_of_the_time_left() {
  local end
  end=$(SLURM_TIME_FORMAT=%s squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e | sed -n 1p) || true
  [[ $end == [0-9]* ]] || exec sleep infinity # NONE
  exec sleep $(((end - $(date +%s)) * 9 / 10))
}

# The ranks. Tasks are not bound to cores: the engines are children of the ranks and use the whole node. One dead rank
# ends the step.
train() {
  local status pid
  srun "${trainer[@]}" --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$tasks" --cpus-per-task="$cpus" --cpu-bind=none \
    --kill-on-bad-exit=1 --wait="${SLURM_WAIT:-60}" "${in_container[@]}" "${python[@]}" -m recipes.train "${hydra[@]}" &
  training=$!
  while true; do
    wait -n "$training" "${servers[@]}" ${timer:+"$timer"} || true # also when a signal has come
    if ! kill -0 "$training" 2> /dev/null; then
      status=0
      wait "$training" || status=$?
      return "$status"
    fi
    for pid in "${servers[@]}"; do
      kill -0 "$pid" 2> /dev/null && continue
      status=0
      wait "$pid" || status=$?
      kill "$training" || true
      wait "$training" || true
      stop "a reward server ended with code $status in the middle of the run; see <run_dir>/servers"
    done
    if [[ -n $timer ]] && ! kill -0 "$timer" 2> /dev/null; then
      stop "the run did not save its step in time: what is behind its newest checkpoint is made again"
    fi
  done
}

# Whether a task starts on each of so many nodes.
answer() {
  timeout 120 srun "${@:2}" --overlap --nodes="$1" --ntasks="$1" --ntasks-per-node=1 --cpus-per-task=1 true
}

nodes_answer() {
  answer "$SLURM_JOB_NUM_NODES" "${trainer[@]}" || return
  [[ -z ${SLURM_HET_SIZE:-} ]] || answer "$(wc -w <<< "$server_hosts")" "${rewards[@]}"
}

# Whether Slurm wants the nodes for another job; its grace may begin with a SIGTERM to the ranks.
preempted() {
  scontrol show job --oneliner "$SLURM_JOB_ID" | grep -q ' PreemptTime=[0-9]'
}

# Whether Slurm starts the preempted job again when it ends. If it were also asked to, it would do so a second time, when the
# job has been finished.
begins_again_anyway() {
  preempted && scontrol show partition --oneliner "$SLURM_JOB_PARTITION" | grep -q ' PreemptMode=[^ ]*REQUEUE'
}

# On every way out: ends the servers. A job that failed begins again where that may help, and says why or why not. One that
# is not RUNNING any more Slurm has ended itself: cancelled, preempted, a node lost; the last two it starts again. Behind its
# time limit it may be RUNNING for a while, but no step starts.
finish() {
  local status=$? state end why
  trap - EXIT
  set +e
  [[ -z $timer ]] || kill "$timer" 2> /dev/null
  stop_servers
  ((status)) || exit 0 # also where Slurm's SIGTERM came behind a command that was well
  read -r state end <<< "$(SLURM_TIME_FORMAT=%s squeue --noheader --jobs="$SLURM_JOB_ID" --format='%T %e' | sed -n 1p)"
  [[ $state == RUNNING ]] || exit "$status"
  if [[ -n $timer ]] || ((status == 75)); then # recipes.run.preemption
    why="it was told to end"
  elif preempted; then
    why="it is preempted"
  elif [[ $end != [0-9]* || $(date +%s) -lt $end ]] && ! nodes_answer; then
    why="a node does not answer"
  elif [[ -n $training ]] && once -m recipes.launch.has_new_checkpoint "$prepared" "${hydra[@]}"; then
    why="it failed with code $status behind a new checkpoint"
  else
    echo "not started again: it failed with code $status without a checkpoint that is newer than its start" >&2
    exit "$status"
  fi
  if ((restarts >= most)); then
    echo "error: not started again though $why: MAX_RESTARTS=$most; go on with resume=true" >&2
    exit "$status"
  fi
  echo "to be started again ($((restarts + 1)) of at most $most times): $why"
  begins_again_anyway && exit "$status"
  scontrol requeue "$SLURM_JOB_ID" || exit "$status"
  sleep 60 # until Slurm ends us
}

run_job() {
  read_site
  read_arguments "$@"
  read_job
  if [[ -n $nodes && $nodes != "$SLURM_JOB_NUM_NODES" ]]; then
    resubmit "$@"
  fi
  hydra+=("cluster.nodes=$SLURM_JOB_NUM_NODES" "cluster.ranks=$tasks")
  read_restarts
  read_container
  servers=() training='' timer=''
  trap finish EXIT
  trap hear USR1
  once -m recipes.preflight "${hydra[@]}" "${checks[@]}"
  start_servers
  once -m recipes.prepare "${hydra[@]}"
  touch "$prepared"
  train
  begins_again_anyway || rm -f "$prepared"
}
