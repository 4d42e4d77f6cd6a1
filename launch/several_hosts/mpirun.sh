#!/bin/sh
# Trains on the hosts of the hostfile beside this file, by mpirun (OpenMPI). Run it on the first host, where relative
# paths of the configuration begin; Python, the configuration and the working folder have the same path on all hosts:
#   CONFIG=configs/debug.yaml sh THIS_FILE [KEY=VALUE]...
set -eu

PYTHON=$(command -v "${PYTHON:-python3}")
CONFIG=${CONFIG:-configs/quickstart.yaml}
PORT=${PORT:-29500}
HERE=$(cd "$(dirname "$0")" && pwd)
HOSTFILE=${HOSTFILE:-$HERE/hostfile}
ENVIRONMENT=${ENVIRONMENT:-$HERE/environment}

# With the variables of an outer launcher, the workers would join its job.
unset PET_NODE_RANK PET_RDZV_BACKEND PET_RDZV_ENDPOINT PET_RDZV_CONF PET_STANDALONE RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE LOCAL_SIZE MASTER_ADDR MASTER_PORT DIST_MOE_PORT
PATH="${PYTHON%/*}:$PATH"
# The lines of the environment file are NAME=VALUE.
set -a
# shellcheck source=/dev/null
. "$ENVIRONMENT"
set +a

# The hostfile: comments begin with #, other lines are `name slots=N`.
hosts() { sed -e 's/#.*//' -e '/^[[:space:]]*$/d' -e 's/slots[[:space:]]*=[[:space:]]*//' "$HOSTFILE"; }
FIRST=$(hosts | awk 'NR == 1 { print $1 }')
# With its whole path, OpenMPI finds its programs in the same folder on the other hosts.
MPIRUN=$(command -v mpirun)
# Every variable of the environment file, as an option of mpirun.
FORWARD=$(sed -n 's/^\([A-Za-z_][A-Za-z0-9_]*\)=.*/-x \1/p' "$ENVIRONMENT")
WORKERS=$(hosts | awk '{ n += ($2 == "" ? 1 : $2) } END { print n }')
export MASTER_ADDR="$FIRST"
export MASTER_PORT="$PORT"
export OMPI_MCA_plm_rsh_args='-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10 -o ServerAliveCountMax=3'
export PRTE_MCA_plm_ssh_args='-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10 -o ServerAliveCountMax=3'

# shellcheck disable=SC2086  # FORWARD is several words
exec "$MPIRUN" \
    --map-by slot:OVERSUBSCRIBE \
    --bind-to none \
    --hostfile "$HOSTFILE" -x MASTER_ADDR -x MASTER_PORT $FORWARD -n "$WORKERS" "$PYTHON" -m dist_moe train "$CONFIG" "$@"
