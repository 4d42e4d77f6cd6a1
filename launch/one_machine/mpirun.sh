#!/bin/sh
# Trains on the devices of this machine, by mpirun (OpenMPI). Run it where relative paths of the configuration begin:
#   CONFIG=configs/debug.yaml WORKERS=2 sh THIS_FILE [KEY=VALUE]...
set -eu

PYTHON=$(command -v "${PYTHON:-python3}")
CONFIG=${CONFIG:-configs/quickstart.yaml}
WORKERS=${WORKERS:-2}
PORT=${PORT:-29500}
THREADS=${THREADS:-$(($(nproc) > WORKERS ? $(nproc) / WORKERS : 1))}

# With the variables of an outer launcher, the workers would join its job.
unset PET_NODE_RANK PET_RDZV_BACKEND PET_RDZV_ENDPOINT PET_RDZV_CONF PET_STANDALONE RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE LOCAL_SIZE MASTER_ADDR MASTER_PORT DIST_MOE_PORT
# OpenMPI 4 gives its workers a terminal even where the output goes to a file.
if [ ! -t 1 ]; then export TTY_COMPATIBLE=0; fi
PATH="${PYTHON%/*}:$PATH"
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-lo}"
export OMP_NUM_THREADS="$THREADS"
export PYTHONSAFEPATH=1
export MASTER_ADDR=127.0.0.1
export MASTER_PORT="$PORT"
export OMPI_MCA_btl='^tcp,ofi'
export OMPI_MCA_pml=ob1
export OMPI_MCA_mtl='^ofi'

exec mpirun \
    --map-by slot:OVERSUBSCRIBE \
    --bind-to none -n "$WORKERS" "$PYTHON" -m dist_moe train "$CONFIG" "$@"
