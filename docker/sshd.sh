#!/bin/sh
# Runs an ssh server as an ordinary user, on port 2222. /keys has authorized_keys, and id_ed25519 to reach other hosts.
set -eu
mkdir -p "$HOME/.ssh" "$HOME/sshd"
chmod 700 "$HOME/.ssh"
cp /keys/authorized_keys "$HOME/.ssh/authorized_keys"
if [ -f /keys/id_ed25519 ]; then
    install -m 600 /keys/id_ed25519 "$HOME/.ssh/id_ed25519"
fi
# Every container creates its host key when it starts, so that other hosts cannot know it before.
printf 'Host *\n    Port 2222\n    StrictHostKeyChecking accept-new\n' > "$HOME/.ssh/config"
if [ ! -f "$HOME/sshd/host_key" ]; then
    ssh-keygen -q -t ed25519 -N "" -f "$HOME/sshd/host_key"
fi
exec /usr/sbin/sshd -D -e -p 2222 -h "$HOME/sshd/host_key" -o "PidFile=$HOME/sshd/pid" -o UsePAM=no \
    -o PasswordAuthentication=no -o PermitUserEnvironment=no "$@"
