"""A container engine for the tests: podman in separate namespaces, with everything that it stores in one folder.

No registry is used: the base image is made from Debian's packages. Containers have a separate network; builds have that
of the machine, and pip's settings, since they install packages. Needs root.
"""

import ast
import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.hosts import Ended, environment, inner

ROOT = Path(__file__).resolve().parents[2]
UP_LIMIT_S = 60.0
BUILD_LIMIT_S = 1800.0
TOOLS = ("podman", "buildah", "runc", "mmdebstrap", "docker", "docker-compose", "unshare", "nsenter")

SETTINGS = """\
[engine]
cgroup_manager = "cgroupfs"
runtime = "runc"
events_logger = "file"
[containers]
log_driver = "k8s-file"
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
[network]
network_backend = "netavark"
network_config_dir = "{folder}/networks"
"""
STORAGE = """\
[storage]
driver = "overlay"
graphroot = "{folder}/storage"
runroot = "{folder}/run"
"""
# The first process: it mounts over the folders of the machine in which podman writes, and becomes podman's service.
START = """\
ip link set lo up
for folder in /run/containers /run/libpod /run/netns /var/lib/containers /dev/shm; do
    mkdir -p $folder
    mount -t tmpfs tmpfs $folder
done
exec podman system service --time=0 unix://{folder}/socket
"""
# As in Debian's slim images.
LEFT_OUT = ("/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/man/*")


@dataclass(frozen=True)
class Engine:
    """A running engine; pid: its first process, with which all others end."""

    folder: Path
    pid: int

    @property
    def variables(self) -> dict[str, str]:
        """The environment by which clients find it: podman and buildah inside, docker and docker-compose anywhere."""
        return environment() | {
            "CONTAINERS_CONF": str(self.folder / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(self.folder / "storage.conf"),
            "DOCKER_HOST": f"unix://{self.folder}/socket",
            "TMPDIR": str(self.folder / "tmp"),
            "HOME": str(self.folder / "home"),
        }

    def run(self, *command: str, limit_s: float = 120, connected: bool = False) -> Ended:
        """Run a command where the containers are; `connected`: with the machine's network instead of theirs."""
        spaces = ("-m", "-p") if connected else ("-m", "-p", "-n")
        return self._ended(["nsenter", "-t", str(self.pid), *spaces, f"--wdns={ROOT}", *command], limit_s)

    def outside(self, *command: str, limit_s: float = 120, **variables: str) -> Ended:
        """Run a client outside of the namespaces, as a user does."""
        return self._ended(command, limit_s, **variables)

    def podman(self, *arguments: str, limit_s: float = 120) -> str:
        """Run podman, which must succeed; return its output."""
        return output_of(self.run("podman", *arguments, limit_s=limit_s))

    def fetch(self, url: str, limit_s: float = 60) -> str:
        """Wait for a page on the containers' network, and return it."""
        code = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1], timeout=10).read().decode())"
        deadline = time.monotonic() + limit_s
        while (got := self.run(sys.executable, "-c", code, url)).code != 0 and time.monotonic() < deadline:
            time.sleep(0.5)
        return output_of(got)

    def build(self, target: str, base: str, context: Path = ROOT) -> str:
        """Build a target of docker/Dockerfile in `context` on a base; return its name, as Docker would name it."""
        name = f"docker.io/library/dist-moe:{target}"
        options = ["--isolation", "chroot", "--pull-never", "--format", "docker", "--layers", *self._mounts()]
        # torch's CPU build is found by the settings of this machine's pip.
        names = ["--build-arg", f"BASE={base}", "--build-arg", "TORCH_INDEX=", "--target", target, "-t", name]
        command = ["buildah", "bud", *options, *names, "-f", f"{context}/docker/Dockerfile", str(context)]
        output_of(self.run(*command, limit_s=BUILD_LIMIT_S, connected=True))
        return name

    def make_base(self, name: str) -> None:
        """Make an image of Debian 12 with Python, like python:3.11-slim-bookworm."""
        archive = self.folder / "base.tar"
        slim = [f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT]
        packages = "--include=ca-certificates,passwd,python3,python3-venv"
        command = ["mmdebstrap", "--variant=apt", packages, *slim, "--dpkgopt=force-unsafe-io", "bookworm"]
        output_of(self.run(*command, str(archive), limit_s=BUILD_LIMIT_S, connected=True))
        self.podman("import", str(archive), name, limit_s=BUILD_LIMIT_S)
        archive.unlink()

    def _mounts(self) -> list[str]:
        """Return options that give the pip of a build the settings of this one, and the files that they name."""
        settings = pip_settings()
        (self.folder / "pip.conf").write_text("[global]\n" + "".join(f"{k} = {v}\n" for k, v in settings.items()))
        paths = set()
        for word in " ".join(settings.values()).split():
            # An index in a folder has its files in that folder.
            path = Path(word.removeprefix("file://")).parent if word.startswith("file:") else Path(word)
            if path.is_absolute() and path.exists():
                paths.add(path)
        pairs = [f"{self.folder}/pip.conf:/etc/pip.conf", *(f"{path}:{path}" for path in sorted(paths))]
        return [word for pair in pairs for word in ("-v", f"{pair}:ro")]

    def _ended(self, command: Sequence[str], limit_s: float, **variables: str) -> Ended:
        began_s = time.monotonic()
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self.variables | variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit_s,
        )
        return Ended(done.returncode, done.stdout, done.stderr, time.monotonic() - began_s)


def output_of(ended: Ended) -> str:
    """Return the output of a command that must have succeeded."""
    assert ended.code == 0, (ended.output + ended.errors)[-6000:]
    return ended.output.strip()


def pip_settings() -> dict[str, str]:
    """Return the settings of this machine's pip, from files and from the environment."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    pairs = [line.partition("=")[::2] for line in listed.splitlines()]
    found = {key.rpartition(".")[2]: " ".join(ast.literal_eval(value).split()) for key, value in reversed(pairs)}
    certificates = os.environ.get("SSL_CERT_FILE")
    return ({"cert": certificates} if certificates else {}) | found


@contextlib.contextmanager
def engine() -> Iterator[Engine]:
    """Start an engine without any image; remove everything it made when the block ends."""
    for tool in TOOLS:
        assert shutil.which(tool, path=environment()["PATH"]), f"{tool} is not installed"
    folder = Path(tempfile.mkdtemp(prefix="dist-moe-engine-"))
    for name in ("home", "networks", "storage", "tmp"):
        (folder / name).mkdir()
    (folder / "containers.conf").write_text(SETTINGS.format(folder=folder))
    (folder / "storage.conf").write_text(STORAGE.format(folder=folder))
    apart = ["unshare", "--net", "--pid", "--fork", "--mount", "--mount-proc", "--kill-child"]
    starting = Engine(folder, 0)
    with (folder / "service.log").open("wb") as log:
        process = subprocess.Popen(
            [*apart, "sh", "-ec", START.format(folder=shlex.quote(str(folder)))],
            env=starting.variables,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        up = Engine(folder, _first_process(process, folder))
        yield up
        up.run("podman", "rm", "--all", "--force", "--time", "0")
    finally:
        process.kill()
        process.wait()
        _remove_groups()
        shutil.rmtree(folder)


def _first_process(outer: subprocess.Popen[bytes], folder: Path) -> int:
    """Wait until the service listens; return the pid of the child of `unshare`."""
    deadline = time.monotonic() + UP_LIMIT_S
    while not (folder / "socket").exists():
        log = (folder / "service.log").read_text(errors="replace")
        assert outer.poll() is None and time.monotonic() < deadline, f"podman does not start: {log}"
        time.sleep(0.05)
    return inner(outer)


def _remove_groups() -> None:
    """Remove the empty control groups of podman."""
    for found in Path("/sys/fs/cgroup").glob("*/libpod_parent"):
        for group in sorted(found.glob("**/"), reverse=True):
            with contextlib.suppress(OSError):
                group.rmdir()
