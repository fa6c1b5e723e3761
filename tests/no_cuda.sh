#!/usr/bin/env bash
# Runs a command with torch's build for CUDA and no GPU: see no_cuda.c. Needs gcc and CUDA's headers.
#
#   tests/no_cuda.sh python tests/gpu.py OUT --only=no_waiting,save,1b_16
#
# What compares numbers fails: they are garbage. Not to be had: NCCL (stage sharded), cuDNN, profiles.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
gcc -shared -fPIC -w -I"${CUDA_HOME:-/usr/local/cuda}/include" "$here/no_cuda.c" -o "$scratch/libcuda.so.1"
ln -s libcuda.so.1 "$scratch/libcuda.so"
export TRITON_LIBCUDA_PATH=$scratch TRITON_CACHE_DIR=$scratch/triton # which keeps what is linked with it
export TORCHINDUCTOR_CACHE_DIR=$scratch/inductor TORCHINDUCTOR_COMPILE_THREADS=1
export TORCH_CUDNN_SDPA_DEPRIORITIZED=1 # Flash attention
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False # which ask the driver for memory
LD_LIBRARY_PATH=$scratch LD_PRELOAD=$scratch/libcuda.so.1 "$@"
