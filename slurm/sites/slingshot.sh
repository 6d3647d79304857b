# shellcheck shell=bash
# A worked example: HPE Cray EX with Slingshot 11, nodes of 4 GH200 or H100 with an adapter of 200 Gb/s each. Never run by us.
# Sources: docs.isambard.ac.uk, guide "NCCL"; docs.cscs.ch, "NCCL" and "libfabric" (Alps); man fi_cxi of libfabric.
#
# A node has 4 GPUs: engines and judges of 8 do not fit, and beside an engine's larger part of the weights the optimiser's
# states do not either. The preflight holds with:
#   make preflight RECIPE=safework_72b ARGS="cluster.nodes=16 cluster.ranks=64 rollout.tensor=4 optimizer.offload=true \
#     rewards.servers.knowledge.tensor=4"
#   sbatch --nodes=16 --ntasks-per-node=4 --gpus-per-node=4 : --nodes=3 --gpus-per-node=4 slurm/safework_72b.sh …
# GH200 has Arm processors: pins.txt is resolved for x86-64 only, so a GH200 needs pins and an image of its own.
SITE_FILE=$(realpath "${BASH_SOURCE[0]}")
export SITE_FILE

export SBATCH_PARTITION=gpu
export SBATCH_ACCOUNT=my-project
export SBATCH_TIMELIMIT=24:00:00

# Addresses and gloo's messages go over the first of the adapters; NCCL takes the prefix of all.
export NCCL_SOCKET_IFNAME=hsn
export GLOO_SOCKET_IFNAME=hsn0

# Data goes through libfabric's provider cxi, for which NCCL needs the plug-in aws-ofi-nccl. By its name NCCL fails where the
# plug-in is missing; else it would go on over TCP, many times slower.
export NCCL_NET_PLUGIN=ofi
export NCCL_NET="AWS Libfabric"
export NCCL_NET_GDR_LEVEL=PHB
export NCCL_CROSS_NIC=1
# Both sites set these two: host buffers are not registered with CUDA, and the memory cache watches through userfaultfd.
export FI_CXI_DISABLE_HOST_REGISTER=1
export FI_MR_CACHE_MONITOR=userfaultfd
# Longer queues for many ranks; messages are matched in software where the adapter's list is full.
export FI_CXI_DEFAULT_CQ_SIZE=131072
export FI_CXI_DEFAULT_TX_SIZE=2048
export FI_CXI_RX_MATCH_MODE=hybrid

# The floor of conf/node_check/h100.yaml is for 400 Gb/s.
export NODE_CHECK="node_check.neighbour_gb_s=10"

export TMPDIR=/tmp
export TRITON_CACHE_DIR=/tmp/$USER-triton
export VLLM_CACHE_ROOT=/tmp/$USER-vllm

# The plug-in is a module on most of these machines; its name differs. Models are downloaded before.
if [[ -n ${SLURM_JOB_ID:-} ]]; then
  export HF_HUB_OFFLINE=1
  module load gcc-native aws-ofi-nccl
fi
