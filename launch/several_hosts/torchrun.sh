#!/bin/sh
# Trains on the hosts of the hostfile beside this file, by torchrun. Run it on each host, where relative
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
# The entry of this host.
HOST=${HOST:-$(hostname)}
NODES=$(hosts | awk 'END { print NR }')
SLOTS=$(hosts | awk -v host="$HOST" '$1 == host { print ($2 == "" ? 1 : $2) }')
if [ -z "$SLOTS" ]; then echo "$HOST is not in $HOSTFILE; set HOST to its name there" >&2; exit 2; fi
INDEX=$(hosts | awk -v host="$HOST" '$1 == host { print NR - 1 }')
# torchrun's store, which holds no pickles, listens on every interface of the first host: keep strangers from $PORT.


exec "$PYTHON" -m torch.distributed.run \
    --nnodes "$NODES" \
    --nproc-per-node "$SLOTS" \
    --node-rank "$INDEX" \
    --master-addr "$FIRST" \
    --master-port "$PORT" \
    --local-addr "$HOST" \
    --max-restarts 0 \
    --log-dir /dev/null \
    --module dist_moe train "$CONFIG" "$@"
