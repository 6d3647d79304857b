#!/usr/bin/env bash
# What the Dockerfile and safework.def run inside an image: Debian's packages, then `make env EXTRA=gpu` as on any machine.
# Beside this file lie the files that make needs; the project itself is not in the image.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

packages=(make g++)                                     # Transformer Engine is compiled now, Triton's kernels in the job
packages+=(ibverbs-providers libibverbs1 librdmacm1t64) # without them NCCL goes over TCP instead of InfiniBand
export DEBIAN_FRONTEND=noninteractive
apt-get update
apt-get install --yes --no-install-recommends "${packages[@]}"
apt-get dist-clean

# An image can't be written to later, so Python's bytecode is made now. Caches would stay in it.
export UV_COMPILE_BYTECODE=1 UV_NO_CACHE=1 PIP_NO_CACHE_DIR=1

# Apptainer builds with the host's /tmp, which a login node may keep small; the wheels take more than 4 GB. On the
# environment's own file system uv links their files instead of copying them.
export TMPDIR=$PWD/tmp
mkdir "$TMPDIR"
make env EXTRA=gpu
rm -r "$TMPDIR"
