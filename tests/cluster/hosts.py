"""Several hosts on one machine: network namespaces on a bridge, each with its own processes, name and ssh server.

Needs root, and the Debian packages openssh-server, openssh-client, iproute2 and pdsh; a slow link needs ethtool.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

NETWORK = "10.77.0"
UP_LIMIT_S = 20.0
TOOLS = ("ip", "ssh", "ssh-keygen", "unshare", "nsenter")

SSHD = """\
Port 22
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PidFile {folder}/{name}.pid
PasswordAuthentication no
PermitRootLogin yes
StrictModes no
UsePAM no
MaxStartups 100
Subsystem sftp internal-sftp
SetEnv TMPDIR={folder}/tmp-{name}
"""
# The first process of a host: it sets up the name, mounts and network of the host, and becomes its ssh server.
START = """\
hostname {name}
mount --bind {folder}/ssh /root/.ssh
mount --bind {folder}/hosts /etc/hosts
mount -t tmpfs -o size=256m tmpfs /dev/shm
ip link set lo up
exec /usr/sbin/sshd -D -e -f {folder}/{name}.conf
"""


@dataclass(frozen=True)
class Host:
    """A running host.

    Attributes:
        name: Its name.
        address: Its address.
        pid: Its first process, with which all others end.
        bridge: The network namespace of the bridge that connects it.
        scratch: Its folder for temporary files; the files of two hosts could have the same names, from equal pids.
    """

    name: str
    address: str
    pid: int
    bridge: str
    scratch: str

    def argv(self, command: Sequence[str], folder: Path) -> list[str]:
        """Return what runs a command on the host."""
        inside = ["nsenter", "-t", str(self.pid), "-n", "-u", "-i", "-p", "-m", f"--wdns={folder}"]
        return [*inside, "env", f"TMPDIR={self.scratch}", *command]

    def run(self, command: Sequence[str], folder: Path, limit_s: float, **variables: str) -> "Ended":
        began_s = time.monotonic()
        done = subprocess.run(
            self.argv(command, folder), env=environment() | variables, capture_output=True, text=True, timeout=limit_s
        )
        return Ended(done.returncode, done.stdout, done.stderr, time.monotonic() - began_s)

    def end(self) -> None:
        """End all its processes, as a power failure does, except that the kernel closes its connections."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def cut_off(self) -> None:
        """Disconnect it; packets on their way are lost."""
        ip("link", "set", f"b-{self.name}", "down", namespace=self.bridge)

    def processes(self) -> list[str]:
        """Return the command lines of its processes, without its ssh server and `ps`."""
        listing = subprocess.run(
            self.argv(["ps", "-eo", "pid=,args="], Path("/")), capture_output=True, text=True, check=False
        ).stdout.splitlines()
        return [line for line in listing if "sshd" not in line and "ps -eo" not in line]


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    output: str
    errors: str
    seconds: float


def environment() -> dict[str, str]:
    """Return the environment of a login, not that of the tests."""
    return {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}


@contextlib.contextmanager
def hosts(count: int, prefix: str = "node") -> Iterator[list[Host]]:
    """Start `count` hosts PREFIX0, PREFIX1, ... that reach each other by ssh without a question.

    The names of their namespaces contain the pid of this process, so that other hosts, such as those of a killed run,
    do not collide with them.
    """
    for tool in TOOLS:
        assert shutil.which(tool), f"{tool} is not installed"
    folder = Path(tempfile.mkdtemp(prefix="dist-moe-hosts-"))
    bridge = _namespace(f"{prefix}-bridge")
    names = [f"{prefix}{number}" for number in range(count)]
    addresses = {name: f"{NETWORK}.{number + 1}" for number, name in enumerate(names)}
    processes: list[subprocess.Popen[bytes]] = []
    try:
        _keys(folder, addresses)
        ip("netns", "add", bridge)
        ip("link", "add", "hub", "type", "bridge", namespace=bridge)
        ip("link", "set", "hub", "up", namespace=bridge)
        for name in names:
            _connect(name, addresses[name], bridge)
            processes.append(_start(folder, name, addresses[name]))
        started = zip(names, processes, strict=True)
        yield [Host(name, addresses[name], inner(process), bridge, f"{folder}/tmp-{name}") for name, process in started]
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for namespace in [*map(_namespace, names), bridge]:
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)
        shutil.rmtree(folder, ignore_errors=True)


def _namespace(name: str) -> str:
    return f"{name}-{os.getpid()}"


def _keys(folder: Path, addresses: dict[str, str]) -> None:
    own = folder / "ssh"
    own.mkdir(mode=0o700)
    for path in (folder / "host_key", own / "id_ed25519"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    shutil.copy(own / "id_ed25519.pub", folder / "authorized_keys")
    host_key = (folder / "host_key.pub").read_text().rsplit(" ", 1)[0]
    known = [f"{name},{address} {host_key}\n" for name, address in addresses.items()]
    (own / "known_hosts").write_text("".join(known))
    lines = ["127.0.0.1 localhost\n", *(f"{address} {name}\n" for name, address in addresses.items())]
    (folder / "hosts").write_text("".join(lines))


def _connect(name: str, address: str, bridge: str) -> None:
    """Make a namespace with one interface, eth0, whose other end is a port of the bridge."""
    own = _namespace(name)
    ip("netns", "add", own)
    ip("link", "add", "eth0", "netns", own, "type", "veth", "peer", "name", f"b-{name}", "netns", bridge)
    ip("link", "set", f"b-{name}", "master", "hub", "up", namespace=bridge)
    ip("address", "add", f"{address}/24", "dev", "eth0", namespace=own)
    ip("link", "set", "eth0", "up", namespace=own)


def _start(folder: Path, name: str, address: str) -> subprocess.Popen[bytes]:
    (folder / f"tmp-{name}").mkdir()
    (folder / f"{name}.conf").write_text(SSHD.format(folder=folder, name=name, address=address))
    Path("/root/.ssh").mkdir(mode=0o700, exist_ok=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    apart = ["unshare", "--uts", "--ipc", "--pid", "--mount", "--fork", "--mount-proc", "--kill-child"]
    command = ["ip", "netns", "exec", _namespace(name), *apart, "sh", "-ec", START.format(folder=folder, name=name)]
    path = folder / f"{name}.log"
    with path.open("wb") as log:
        process = subprocess.Popen(command, env=environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    deadline = time.monotonic() + UP_LIMIT_S
    while "Server listening" not in (log_text := path.read_text(errors="replace")):
        assert process.poll() is None and time.monotonic() < deadline, f"{name} does not start: {log_text}"
        time.sleep(0.02)
    return process


def inner(outer: subprocess.Popen[bytes]) -> int:
    """Return the pid, on this machine, of the child of `nsenter` or `unshare`."""
    return int(Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()[0])


def ip(*arguments: str, namespace: str | None = None) -> None:
    """Run `ip`, in a network namespace if one is given."""
    inside = () if namespace is None else ("-n", namespace)
    subprocess.run(["ip", *inside, *arguments], check=True, capture_output=True, text=True)
