#!/bin/sh
# Installs the torch of constraints.txt into the environment of PYTHON, as a build that fits this machine, before pip
# installs the rest: the CPU build of PyTorch's own index where there is no GPU (200 MB), and pip's default build where
# there is one, which is that with CUDA (several GB).
#   sh setup.sh .venv/bin/python
# TORCH_INDEX: another package index, such as https://download.pytorch.org/whl/cu128; "pip" for pip's default build.
# Where the index does not answer within a few seconds, or has no such build, pip installs its default build later.
set -eu

python="$1"
index="${TORCH_INDEX:-}"
wanted="$(grep '^torch==' "$(dirname "$0")/constraints.txt")"

if "$python" -c "import importlib.metadata, sys
sys.exit(importlib.metadata.version('torch').partition('+')[0] != '${wanted#torch==}')" 2>/dev/null; then
    exit 0
fi
if [ -z "$index" ]; then
    if [ "$(uname -s)" != Linux ] || timeout 20 nvidia-smi -L 2>/dev/null | grep -q GPU; then
        index=pip
    else
        index=https://download.pytorch.org/whl/cpu
    fi
fi
if [ "$index" = pip ]; then
    echo "torch: the default build of pip"
    exit 0
fi
# The alarm ends a request that goes on for longer than the time-out of each read.
if "$python" -c "import signal, sys, urllib.request
signal.alarm(8)
urllib.request.urlopen(sys.argv[1].rstrip('/') + '/torch/', timeout=4).read()" "$index" >/dev/null 2>&1 \
    && "$python" -m pip install --quiet --disable-pip-version-check --timeout 15 --retries 0 --no-deps \
        --index-url "$index" "$wanted"; then
    echo "torch: the build of $index"
else
    echo "torch: $index cannot be used, so the default build of pip; set TORCH_INDEX for another index"
fi
