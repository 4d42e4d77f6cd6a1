#!/bin/sh
# Trains on the hosts of the hostfile beside this file, by deepspeed. Run it on the first host, where relative
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
export DS_ENV_FILE="$ENVIRONMENT"
export PDSH_SSH_ARGS_APPEND='-o BatchMode=yes -o ConnectTimeout=10'
export PDSH_RCMD_TYPE=ssh

exec "$PYTHON" "${PYTHON%/*}"/deepspeed \
    --hostfile "$HOSTFILE" \
    --launcher pdsh \
    --force_multi \
    --no_ssh_check \
    --master_addr "$FIRST" \
    --master_port "$PORT" \
    --log_level error \
    --no_local_rank \
    --module dist_moe train "$CONFIG" "$@"
