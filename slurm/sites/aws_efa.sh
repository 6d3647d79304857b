# shellcheck shell=bash
# A worked example: p5.48xlarge (8 H100, 32 EFA adapters, 3,200 Gb/s) under AWS ParallelCluster. Never run by us. Sources: the
# EC2 user guide, "Get started with EFA and NCCL"; the wiki of aws-ofi-nccl, "Environment Variables"; the Slurm scripts of
# aws-samples/awsome-distributed-training.
SITE_FILE=$(realpath "${BASH_SOURCE[0]}")
export SITE_FILE

export SBATCH_PARTITION=p5
export SBATCH_TIMELIMIT=24:00:00

# Addresses and gloo's messages go over the first Ethernet interface. NCCL takes a list of what to leave out, gloo needs the
# name (`ip -brief address`).
export NCCL_SOCKET_IFNAME=^docker,lo,veth
export GLOO_SOCKET_IFNAME=enp71s0

# Data goes through libfabric, for which NCCL needs the plug-in aws-ofi-nccl. The EFA installer puts both into /opt/amazon. By
# its name NCCL fails where the plug-in is missing; else it would go on over TCP, many times slower.
export LD_LIBRARY_PATH=/opt/amazon/ofi-nccl/lib:/opt/amazon/efa/lib:${LD_LIBRARY_PATH:-}
export NCCL_NET_PLUGIN=ofi
export NCCL_NET="AWS Libfabric"
export FI_PROVIDER=efa
# With huge pages a process that forks, as ranks do for engines, can fail with "Cannot allocate memory" (EC2 user guide).
export FI_EFA_USE_HUGE_PAGE=0

# Instances have local disks, which ParallelCluster mounts at /scratch.
export TMPDIR=/scratch
export TRITON_CACHE_DIR=/scratch/$USER-triton
export VLLM_CACHE_ROOT=/scratch/$USER-vllm

# /opt/amazon holds the plug-in and /scratch the caches above; a container needs both.
# export CONTAINER=pyxis:/fsx/safework.sqsh
# export CONTAINER_MOUNTS=/fsx,/opt/amazon,/scratch
