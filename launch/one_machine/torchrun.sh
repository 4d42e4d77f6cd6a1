#!/bin/sh
# Trains on the devices of this machine, by torchrun. Run it where relative paths of the configuration begin:
#   CONFIG=configs/debug.yaml WORKERS=2 sh THIS_FILE [KEY=VALUE]...
set -eu

PYTHON=$(command -v "${PYTHON:-python3}")
CONFIG=${CONFIG:-configs/quickstart.yaml}
WORKERS=${WORKERS:-2}
PORT=${PORT:-29500}
THREADS=${THREADS:-$(($(nproc) > WORKERS ? $(nproc) / WORKERS : 1))}

# With the variables of an outer launcher, the workers would join its job.
unset PET_NODE_RANK PET_RDZV_BACKEND PET_RDZV_ENDPOINT PET_RDZV_CONF PET_STANDALONE RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE LOCAL_SIZE MASTER_ADDR MASTER_PORT DIST_MOE_PORT
# Nothing of torchrun listens: its rendezvous is a file without a name, which only you can read.
RENDEZVOUS=$(mktemp)
exec 3<>"$RENDEZVOUS"
rm "$RENDEZVOUS"
RENDEZVOUS=/proc/self/fd/3
PATH="${PYTHON%/*}:$PATH"
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-lo}"
export OMP_NUM_THREADS="$THREADS"
export PYTHONSAFEPATH=1
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export DIST_MOE_PORT="$PORT"

exec "$PYTHON" -m torch.distributed.run \
    --nnodes 1 \
    --nproc-per-node "$WORKERS" \
    --rdzv-backend c10d \
    --rdzv-conf store_type=file \
    --rdzv-endpoint "$RENDEZVOUS" \
    --local-addr 127.0.0.1 \
    --max-restarts 0 \
    --log-dir /dev/null \
    --module dist_moe train "$CONFIG" "$@"
