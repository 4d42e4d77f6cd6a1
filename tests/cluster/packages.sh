#!/bin/sh
# Installs the Debian packages that the tests over several hosts need, if one is missing.
set -eu
missing=""
pairs="sshd:openssh-server ssh:openssh-client ip:iproute2 ethtool:ethtool pdsh:pdsh ps:procps"
pairs="$pairs slurmctld:slurmctld slurmd:slurmd srun:slurm-client"
pairs="$pairs mpirun.openmpi:openmpi-bin mpirun.mpich:mpich"
# For the containers: mmdebstrap makes their base image, so that no registry is needed.
pairs="$pairs buildah:buildah podman:podman runc:runc iptables:iptables mmdebstrap:mmdebstrap"
pairs="$pairs docker-compose:docker-compose docker:docker.io /usr/lib/podman/aardvark-dns:aardvark-dns"
for pair in $pairs; do
    PATH="$PATH:/usr/sbin:/sbin" command -v "${pair%%:*}" > /dev/null || missing="$missing ${pair##*:}"
done
if [ -n "$missing" ]; then
    apt-get update -q
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $missing
fi
