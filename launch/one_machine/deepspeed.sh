#!/bin/sh
# Trains on the devices of this machine, by deepspeed. Run it where relative paths of the configuration begin:
#   CONFIG=configs/debug.yaml WORKERS=2 sh THIS_FILE [KEY=VALUE]...
set -eu

PYTHON=$(command -v "${PYTHON:-python3}")
CONFIG=${CONFIG:-configs/quickstart.yaml}
WORKERS=${WORKERS:-2}
PORT=${PORT:-29500}
THREADS=${THREADS:-$(($(nproc) > WORKERS ? $(nproc) / WORKERS : 1))}

# With the variables of an outer launcher, the workers would join its job.
unset PET_NODE_RANK PET_RDZV_BACKEND PET_RDZV_ENDPOINT PET_RDZV_CONF PET_STANDALONE RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE LOCAL_SIZE MASTER_ADDR MASTER_PORT DIST_MOE_PORT
# DeepSpeed's launcher overwrites CUDA_VISIBLE_DEVICES; the workers restore it from this copy.
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    export DIST_MOE_VISIBLE_DEVICES="$CUDA_VISIBLE_DEVICES"
fi
PATH="${PYTHON%/*}:$PATH"
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-lo}"
export OMP_NUM_THREADS="$THREADS"
export PYTHONSAFEPATH=1

exec "$PYTHON" "${PYTHON%/*}"/deepspeed \
    --hostfile /dev/null \
    --num_accelerators "$WORKERS" \
    --master_addr 127.0.0.1 \
    --master_port "$PORT" \
    --log_level error \
    --no_local_rank \
    --module dist_moe train "$CONFIG" "$@"
