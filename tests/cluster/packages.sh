#!/bin/sh
# What the tests over several hosts need of Debian; nothing where all of it is there.
set -eu
missing=""
for pair in sshd:openssh-server ssh:openssh-client ip:iproute2 ethtool:ethtool pdsh:pdsh ps:procps slurmctld:slurmctld slurmd:slurmd srun:slurm-client; do
    PATH="$PATH:/usr/sbin:/sbin" command -v "${pair%%:*}" > /dev/null || missing="$missing ${pair##*:}"
done
if [ -n "$missing" ]; then
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $missing
fi
