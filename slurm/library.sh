# shellcheck shell=bash
# Functions that the job scripts share. A script has its #SBATCH lines, changes to the repository's root, sources this
# file and calls `run_job recipe=NAME "$@"`. run_job checks the nodes, runs the preflight, starts reward servers if the
# recipe needs them, and starts one task per rank. Everything after the script's name goes to Hydra:
#
#   sbatch slurm/safework_72b.sh algorithm=cpgd stage=rl_safety
#   sbatch slurm/safework_72b.sh cluster.nodes=16      # or, without a second wait in the queue:
#   sbatch --nodes=16 : slurm/safework_72b.sh          # options before the colon: only for the trainer's component
#
# The job's exit code is that of the first part that failed. A failed job is requeued where that may help, and then
# resumes (on_exit).
#
# A heterogeneous job has the ranks in component 0 and the servers in component 1. In a job with one component, the
# servers share its nodes. slurm/sites/template.sh has a site's variables. docs/slurm.md is the introduction.
set -euo pipefail
NODE_CHECK_SECONDS=600 # time limit of a node check

stop() {
  echo "error: $*" >&2
  exit 1
}

# set +u, because module systems read unset variables.
read_site() {
  if [[ -n ${SITE_FILE:-} ]]; then
    set +u
    # shellcheck disable=SC1090  # the site's own file
    source "$SITE_FILE"
    set -u
  else
    echo "no site file: this cluster's network, disks and container are not set (source slurm/sites/SITE.sh before sbatch)" >&2
  fi
  # pip installs CUDA's libraries. With these variables, Transformer Engine would prefer another cuDNN, and vLLM would
  # compile with that CUDA's nvcc.
  unset CUDA_HOME CUDA_PATH
}

# Sorts the command line into
#   hydra         arguments of every program
#   checks        the preflight's own overrides
#   node_checks   the node check's own overrides
#   nodes         cluster.nodes
#   engine_nodes  cluster.engine_nodes, which every program gets too
read_arguments() {
  hydra=() checks=() nodes='' engine_nodes=0
  local argument flags=()
  read -ra node_checks <<< "${NODE_CHECK:-}"
  for argument in "$@"; do
    case $argument in
      --*) flags+=("$argument") ;; # Hydra needs all overrides in one row
      preflight=* | preflight.*) checks+=("$argument") ;;
      node_check=* | node_check.*) node_checks+=("$argument") ;;
      cluster.nodes=*) nodes=${argument#*=} ;;
      cluster.engine_nodes=*) engine_nodes=${argument#*=} hydra+=("$argument") ;;
      *) hydra+=("$argument") ;;
    esac
  done
  hydra=(${flags[@]+"${flags[@]}"} "${hydra[@]}")
}

# Sets the trainer's hosts, tasks and GPUs and the servers' hosts from Slurm's variables.
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

# A requeued job resumes the run that its earlier start prepared. It does not resume what an older job left in the run's
# folder. The modification time of the file $prepared is the time when the ranks were last started.
read_restarts() {
  resumes=false
  restarts=${SLURM_RESTART_COUNT:-0}
  max_restarts=${MAX_RESTARTS:-20}
  prepared=slurm-$SLURM_JOB_ID.prepared
  ((restarts <= max_restarts)) || stop "the job was requeued $restarts times, MAX_RESTARTS=$max_restarts"
  if ((restarts == 0)); then
    rm -f "$prepared"
  elif [[ -e $prepared ]]; then
    resumes=true
    hydra+=(resume=true overwrite=false) # overwrite=true was for the first start, which has moved the old run aside
    echo "restart $restarts of at most $max_restarts: resumes"
  fi
}

# Slurm allocates the nodes before Hydra reads cluster.nodes. A job with another number of nodes submits itself again,
# with the tasks, CPUs, GPUs and partition of its trainer. Then it is cancelled, so that jobs that depend on it do not
# start.
resubmit() {
  local script name job=$SLURM_JOB_ID colon=${SLURM_HET_SIZE:+:}
  local gpus=${SLURM_GPUS_PER_NODE_HET_GROUP_0:-${SLURM_GPUS_PER_NODE:-}}
  local size=(--nodes="$((nodes + engine_nodes))" --ntasks-per-node="$per_node" --cpus-per-task="$cpus")
  size+=(--partition="$SLURM_JOB_PARTITION" ${gpus:+--gpus-per-node="$gpus"})
  script=$(scontrol show job --oneliner "$SLURM_JOB_ID" | grep -o ' Command=[^ ]*' | sed -n '1s/ Command=//p')
  echo "cluster.nodes=$nodes, the job has $SLURM_JOB_NUM_NODES: submitted again (sbatch --nodes=$((nodes + engine_nodes)) saves this)"
  cd "$SLURM_SUBMIT_DIR" # for its log
  for name in $(compgen -e SLURM_); do # the new job would inherit this job's variables
    [[ $name == SLURM_CONF ]] || unset "$name"
  done
  sbatch "${size[@]}" ${colon:+"$colon"} "$script" "$@"
  scancel "$job"
  wait_to_be_ended
}

# Slurm ends this job in a moment. The shell replaces itself by sleep instead of forking it. Slurm could miss a child
# that is forked while it collects the job's processes, and the child would outlive the job.
wait_to_be_ended() {
  trap '' USR1
  exec sleep 60
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

# Runs one process on each of $1 nodes, all of them even if one fails. The other arguments up to -- are srun's.
on_each_node() {
  local nodes=$1 options=()
  shift
  while [[ $1 != -- ]]; do
    options+=("$1")
    shift
  done
  timeout "$NODE_CHECK_SECONDS" srun "${options[@]}" --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 \
    --cpus-per-task=1 --cpu-bind=none --kill-on-bad-exit=0 "${in_container[@]}" "${python[@]}" "${@:2}"
}

# Whether the nodes are fit. First each node is checked by itself, then the links between the ranks' GPUs.
nodes_are_fit() {
  local check=(-m recipes.node_check "${hydra[@]}" "${node_checks[@]}")
  on_each_node "$SLURM_JOB_NUM_NODES" "${trainer[@]}" -- "${check[@]}" || return
  if [[ -n ${SLURM_HET_SIZE:-} ]]; then
    MASTER_ADDR=${server_hosts%% *} on_each_node "$(wc -w <<< "$server_hosts")" "${rewards[@]}" -- "${check[@]}" \
      "node_check.gpus=$gpus" || return
  fi
  ((gpus)) || return 0
  timeout "$NODE_CHECK_SECONDS" srun "${trainer[@]}" --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$tasks" \
    --cpus-per-task="$cpus" --cpu-bind=none --kill-on-bad-exit=1 "${in_container[@]}" "${python[@]}" \
    -m recipes.node_check.links "${hydra[@]}" "${node_checks[@]}"
}

# Sets bad_nodes, which on_exit reads, and fails if a node is not fit.
check_nodes() {
  local status=0 verdicts=slurm-$SLURM_JOB_ID.nodes
  nodes_are_fit | tee "$verdicts" || status=$?
  if ((status == 124)); then # of timeout
    echo "error: the check of the nodes did not end within $NODE_CHECK_SECONDS s: a node named above without a verdict, or" \
      "the network between them, hangs; submit with --exclude=NODE" >&2
  fi
  bad_nodes=$(sed -n 's/^bad node \([^:]*\): .*/\1/p' "$verdicts" | sort -u | paste -sd,)
  rm -f "$verdicts"
  return "$status"
}

# Adds the bad nodes to the nodes that the requeued job excludes.
exclude_bad_nodes() {
  local avoided
  avoided=$(scontrol show job "$SLURM_JOB_ID" | sed -n '/ExcNodeList=(null)/!s/.* ExcNodeList=\([^ ]*\).*/\1,/p' | sed -n 1p)
  scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$avoided$bad_nodes"
}

# Runs one process on the trainer's first node.
run_once() {
  srun "${trainer[@]}" --nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task="$cpus" --cpu-bind=none \
    "${in_container[@]}" "${python[@]}" "$@"
}

# Whether http://HOST:PORT/health answers with status 200.
healthy() {
  local host=${1#http://}
  # shellcheck disable=SC2016  # the inner shell expands $1 and $2
  timeout 5 bash -c 'exec 3<> "/dev/tcp/$1/$2" && printf "GET /health HTTP/1.0\r\n\r\n" >&3 && read -r _ code _ <&3 &&
    [[ $code == 200 ]]' bash "${host%:*}" "${host##*:}" 2> /dev/null
}

# Starts the reward servers that the recipe needs, waits until they answer, and adds their addresses to the overrides.
start_servers() {
  local plan host words timeout addresses address pid
  plan=$(run_once -m rewards.placement "${server_hosts// /,}" "$first_free" "$gpus" "${hydra[@]}")
  if [[ -z $plan ]]; then
    [[ -z ${SLURM_HET_SIZE:-} ]] || stop "this run starts no reward servers, and the job's second component would stand idle:" \
      "submit slurm/train.sh with --nodes, --ntasks-per-node and --gpus-per-node of the first one"
    return 0
  fi
  REWARDS_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n') # in the environment: others can read command lines
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

# Shuts the servers down cleanly. SIGTERM goes to their steps, because a signal to srun would kill them.
stop_servers() {
  local steps
  ((${#servers[@]})) || return 0
  steps=$(squeue --noheader --steps --jobs="$server_job" --format='%i %j' | sed -n 's/ rewards$//p')
  # shellcheck disable=SC2086  # one word a step
  [[ -z $steps ]] || scancel --signal=TERM $steps || true # scancel fails if the step is just ending
  wait "${servers[@]}" || true
}

# Slurm sends SIGUSR1 when the job has to end soon. The signal is passed on to the ranks, which finish their step and
# save a checkpoint. A timer limits how long they may take.
on_sigusr1() {
  if [[ -z ${training:-} ]]; then
    echo "SIGUSR1 before training began is ignored: --time must be longer than the seconds of --signal"
    return
  fi
  echo "preemption requested by Slurm: the run finishes its step and saves"
  if [[ -z $timer ]]; then
    grace_timer &
    timer=$!
  fi
  kill -USR1 "$training" 2> /dev/null || true # srun passes it on
}

# Sleeps for nine tenths of the job's remaining time.
grace_timer() {
  local end
  end=$(SLURM_TIME_FORMAT=%s squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e | sed -n 1p) || true
  [[ $end == [0-9]* ]] || exec sleep infinity # the job has no time limit
  exec sleep $(((end - $(date +%s)) * 9 / 10))
}

# Starts the ranks and watches them, the servers and the timer.
# - Tasks are not bound to cores, because the engines are children of the ranks and use all cores of the node.
# - The ranks fill one node after another, whatever the site's default. The last ranks are on the engines' nodes.
# - If a rank dies, the step ends.
train() {
  local status pid
  srun "${trainer[@]}" --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$tasks" --cpus-per-task="$cpus" --cpu-bind=none \
    --distribution=block --kill-on-bad-exit=1 --wait="${SLURM_WAIT:-60}" "${in_container[@]}" "${python[@]}" -m recipes.train "${hydra[@]}" &
  training=$!
  while true; do
    wait -n "$training" "${servers[@]}" ${timer:+"$timer"} || true # a signal also interrupts it
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
      stop "the run did not save in time: the steps after its newest checkpoint are repeated"
    fi
  done
}

# Whether a task starts on each of $1 nodes. The other arguments are srun's.
tasks_start() {
  timeout 120 srun "${@:2}" --overlap --nodes="$1" --ntasks="$1" --ntasks-per-node=1 --cpus-per-task=1 true
}

nodes_respond() {
  tasks_start "$SLURM_JOB_NUM_NODES" "${trainer[@]}" || return
  [[ -z ${SLURM_HET_SIZE:-} ]] || tasks_start "$(wc -w <<< "$server_hosts")" "${rewards[@]}"
}

# Whether Slurm preempts this job. Its grace time may begin with a SIGTERM to the ranks.
preempted() {
  scontrol show job --oneliner "$SLURM_JOB_ID" | grep -q ' PreemptTime=[0-9]'
}

# Whether Slurm itself requeues the preempted job when it ends. An additional `scontrol requeue` would start the job
# once more after it has finished.
slurm_requeues() {
  preempted && scontrol show partition --oneliner "$SLURM_JOB_PARTITION" | grep -q ' PreemptMode=[^ ]*REQUEUE'
}

# Stops the servers, whatever ends the script, and requeues a failed job where that may help. The log says why, or why
# not. Slurm has ended a job that is no longer RUNNING: it was cancelled or preempted, or lost a node. In the last two
# cases Slurm requeues it itself. After its time limit a job may be RUNNING for a while, but no step starts.
on_exit() {
  local status=$? state end why ended=''
  trap - EXIT
  set +e
  [[ -z $timer ]] || kill "$timer" 2> /dev/null
  stop_servers
  ((status)) || exit 0 # Slurm's SIGTERM may come after everything succeeded
  read -r state end <<< "$(SLURM_TIME_FORMAT=%s squeue --noheader --jobs="$SLURM_JOB_ID" --format='%T %e' | sed -n 1p)"
  [[ $state == RUNNING ]] || exit "$status"
  if [[ -n $bad_nodes ]]; then
    if [[ ${EXCLUDE_BAD_NODES:-false} != true ]]; then
      echo "not requeued: bad nodes $bad_nodes; submit with --exclude=$bad_nodes, or set EXCLUDE_BAD_NODES=true" >&2
      exit "$status"
    fi
    why="bad nodes $bad_nodes are excluded"
  elif [[ -n $timer ]] || ((status == 75)); then # EXIT_CODE of recipes/run/preemption.py
    why="preemption was requested"
  elif preempted; then
    why="it is preempted"
  elif [[ $end != [0-9]* || $(date +%s) -lt $end ]] && ! nodes_respond; then
    why="a node does not respond"
  elif [[ -n $training ]] && run_once -m recipes.launch.has_new_checkpoint "$prepared" "${hydra[@]}"; then
    why="it failed with code $status after a new checkpoint"
  else
    echo "not requeued: it failed with code $status without a checkpoint that is newer than its start" >&2
    exit "$status"
  fi
  if ((restarts >= max_restarts)); then
    echo "error: not requeued although $why: MAX_RESTARTS=$max_restarts; continue with resume=true" >&2
    exit "$status"
  fi
  echo "requeued (restart $((restarts + 1)) of at most $max_restarts): $why"
  slurm_requeues && exit "$status"
  [[ -z $bad_nodes ]] || trap 'ended=true' TERM
  scontrol requeue "$SLURM_JOB_ID" || exit "$status"
  # A running job's list can't be changed. A requeued job's can, until Slurm has ended this script.
  [[ -z $bad_nodes ]] || (trap '' TERM && exclude_bad_nodes)
  [[ -z $ended ]] || exit "$status"
  trap - TERM
  wait_to_be_ended
}

run_job() {
  local argument
  for argument in "$@"; do
    [[ $argument != stage=ladder ]] || stop "$argument: a job runs one stage; slurm/ladder.sh SCRIPT submits a job for each"
  done
  read_site
  read_arguments "$@"
  read_job
  if [[ -n $nodes && $((nodes + engine_nodes)) != "$SLURM_JOB_NUM_NODES" ]]; then
    resubmit "$@"
  fi
  hydra+=("cluster.nodes=$((SLURM_JOB_NUM_NODES - engine_nodes))" "cluster.ranks=$((tasks - engine_nodes * per_node))")
  read_restarts
  read_container
  servers=() training='' timer='' bad_nodes=''
  trap on_exit EXIT
  trap on_sigusr1 USR1
  check_nodes
  # When the job resumes, the preflight of an earlier start has already checked these settings.
  [[ $resumes == true ]] || run_once -m recipes.preflight "${hydra[@]}" "${checks[@]}"
  run_once -m recipes.launch.claim "${hydra[@]}" # before the servers, which take minutes and write to the run's folder
  start_servers
  run_once -m recipes.prepare "${hydra[@]}"
  touch "$prepared"
  train
  slurm_requeues || rm -f "$prepared"
}
