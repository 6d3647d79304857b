# shellcheck shell=bash
# A worked example: nodes of 8 H100 with an InfiniBand adapter of 400 Gb/s for each GPU, as in a DGX H100. Never run by us.
# Copy it, and compare names with `ibdev2netdev` and `ip -brief address` on a node. The variables are described in NVIDIA's
# NCCL user guide, "Environment Variables".
SITE_FILE=$(realpath "${BASH_SOURCE[0]}")
export SITE_FILE

export SBATCH_PARTITION=gpu
export SBATCH_ACCOUNT=my-project
export SBATCH_TIMELIMIT=24:00:00

# Addresses and gloo's messages go over IP: IP over InfiniBand, or the Ethernet of the nodes.
export NCCL_SOCKET_IFNAME=ib0
export GLOO_SOCKET_IFNAME=ib0

# Data goes over the adapters. "mlx5" would be a prefix, which takes storage and Ethernet adapters too; "=" names them exactly.
# On a DGX H100 mlx5_1, mlx5_2, mlx5_7 and mlx5_8 are not of the compute network (NVIDIA DGX H100 user guide, "Network Ports").
export NCCL_IB_HCA="=mlx5_0,mlx5_3,mlx5_4,mlx5_5,mlx5_6,mlx5_9,mlx5_10,mlx5_11"

# Where a cable that is unplugged for a moment must not end the run. An operation waits 4.096 us x 2^timeout for its
# acknowledgement, and is sent retry_cnt times. NCCL's defaults are 20 (4 s) and 7.
export NCCL_IB_TIMEOUT=22

# RoCE, InfiniBand's protocol on Ethernet, needs two lines more; ask the site for the traffic class. NCCL finds the GID itself.
# export NCCL_IB_TC=106
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0

export TMPDIR=/tmp
export TRITON_CACHE_DIR=/tmp/$USER-triton
export VLLM_CACHE_ROOT=/tmp/$USER-vllm

# A module of gcc is all that jobs need. Models are downloaded before.
if [[ -n ${SLURM_JOB_ID:-} ]]; then
  export HF_HUB_OFFLINE=1
  module load gcc/13
fi
