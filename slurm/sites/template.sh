# shellcheck shell=bash
# A site's settings. Copy it to slurm/sites/SITE.sh, fill in what your cluster needs, delete the rest, and source it in the
# shell that submits: `source slurm/sites/SITE.sh`. Jobs source it again by themselves. infiniband.sh, aws_efa.sh and
# slingshot.sh in this folder are worked examples.
SITE_FILE=$(realpath "${BASH_SOURCE[0]}")
export SITE_FILE

# Account and partition, as sbatch's variables; options of sbatch take precedence over them.
export SBATCH_PARTITION=gpu
export SBATCH_ACCOUNT=my-project
export SBATCH_TIMELIMIT=24:00:00

# The safework_* scripts ask for complete nodes and all of their memory (--exclusive --mem=0). Where that is not how the site
# gives it:
# export SBATCH_MEM_PER_NODE=1900G
# export SBATCH_QOS=full-node

# The grace: so many seconds before the time limit the run is asked to save, and the job is requeued, at most MAX_RESTARTS
# times (docs/slurm.md). A step and a checkpoint must fit into it.
# export SBATCH_SIGNAL=B:USR1@1800   # 900 in the job scripts
# export MAX_RESTARTS=50             # 20

# Every node is checked first. A bad one ends the job; with true the job is requeued without it. NODE_CHECK has settings of
# conf/node_check/, for example a floor that fits the network.
# export EXCLUDE_BAD_NODES=true
# export NODE_CHECK="node_check.neighbour_gb_s=10"

# NCCL's all-reduce inside the NVLink switch (NVLS) has no fixed order (docs/determinism.md). For the same bits every time:
# export NCCL_NVLS_ENABLE=0

# The network interface between nodes (`ip -brief address` on a node), for torch.distributed's two backends.
export NCCL_SOCKET_IFNAME=ib0
export GLOO_SOCKET_IFNAME=ib0

# A folder on each node's local disk: temporary files and the caches of compilers.
export TMPDIR=/tmp
export TRITON_CACHE_DIR=/tmp/$USER-triton
export VLLM_CACHE_ROOT=/tmp/$USER-vllm

# The one variable of the container. Unset: .venv, made by `make env EXTRA=gpu`. slurm/container/ makes the image.
# export CONTAINER=apptainer:/images/safework.sif      # or singularity:…
# export CONTAINER=pyxis:/images/safework.sqsh         # Pyxis and Enroot; also a registry's image
# export CONTAINER_MOUNTS=/models,/datasets            # folders beside the repository's, at the same place inside

# Of jobs alone. Their nodes often have no way to the hub: python -m recipes.download on the login node first. No module of
# CUDA, cuDNN or NCCL: pip brings them, and two of a kind do not go together. Triton needs a C compiler.
if [[ -n ${SLURM_JOB_ID:-} ]]; then
  export HF_HUB_OFFLINE=1
  module load gcc/13
fi
