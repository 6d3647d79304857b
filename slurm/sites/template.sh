# shellcheck shell=bash
# A site's settings. Copy it to slurm/sites/SITE.sh, fill in what your cluster needs, delete the rest, and source it in the
# shell that submits: `source slurm/sites/SITE.sh`. Jobs source it again by themselves.
SITE_FILE=$(realpath "${BASH_SOURCE[0]}")
export SITE_FILE

# Account and partition, as sbatch's variables; options of sbatch take precedence over them.
export SBATCH_PARTITION=gpu
export SBATCH_ACCOUNT=my-project
export SBATCH_TIMELIMIT=24:00:00

# The grace: so many seconds before the time limit the run is asked to save, and the job is requeued, at most MAX_RESTARTS
# times (docs/slurm.md). A step and a checkpoint must fit into it.
# export SBATCH_SIGNAL=B:USR1@1800   # 900 in the job scripts
# export MAX_RESTARTS=50             # 20

# The network interface between nodes (`ip -brief address` on a node), for torch.distributed's two backends.
export NCCL_SOCKET_IFNAME=ib0
export GLOO_SOCKET_IFNAME=ib0

# A folder on each node's local disk: temporary files and the caches of compilers.
export TMPDIR=/tmp
export TRITON_CACHE_DIR=/tmp/$USER-triton
export VLLM_CACHE_ROOT=/tmp/$USER-vllm

# The one variable of the container. Unset: .venv, made by `make env EXTRA=gpu`. An image needs python3 with pins.txt.
# export CONTAINER=apptainer:/images/safework.sif      # or singularity:…
# export CONTAINER=pyxis:/images/safework.sqsh         # Pyxis and Enroot; also a registry's image
# export CONTAINER_MOUNTS=/models,/datasets            # folders beside the repository's, at the same place inside

# Only jobs load modules: the preflight on a login node needs none.
if [[ -n ${SLURM_JOB_ID:-} ]]; then
  module load cuda/13.0
fi
