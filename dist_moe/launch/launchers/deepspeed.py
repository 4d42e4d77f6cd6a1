"""The launcher of DeepSpeed, for this host and, by one of its runners, for several."""

import base64
import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dist_moe.config.sections.cluster import ClusterConfig
from dist_moe.launch import deepspeed_host
from dist_moe.launch.cluster import (
    CONNECT_LIMIT_S,
    Cluster,
    forwarded_env,
    launcher_environment,
    require_first_devices,
    require_ipv4,
    require_shell_safe,
)
from dist_moe.launch.command import (
    Command,
    LaunchError,
    has_devices,
    private_path,
    worker_environment,
    worker_variables,
)
from dist_moe.launch.launcher import LaunchRequest, ProcessLauncher
from dist_moe.launch.launchers.mpirun import (
    loaded_mpi,
    mpich_options,
    mpirun_of,
    openmpi_environment,
    openmpi_network,
    openmpi_options,
    root_option,
)
from dist_moe.launch.outer_job import without_allocation
from dist_moe.launch.scripts import one_machine_script, several_hosts_script
from dist_moe.launch.supervise.secret_file import SCHEME
from dist_moe.launch.template import ALL_ARGUMENTS, PYTHON, shell_command, shell_exports, shell_variable
from dist_moe.worker.contract import KEPT_DEVICES_VARIABLE, LAUNCH_VARIABLE, VISIBLE_DEVICES_VARIABLE
from dist_moe.worker.network import LOOPBACK, free_port

# DeepSpeed reads the variables that it sets on other hosts from the file that this one names.
ENVIRONMENT_FILE = "DS_ENV_FILE"
MPI_RUNNERS = {"openmpi": "OpenMPI", "mpich": "MPICH"}
KEEP_DEVICES_SCRIPT = f"""\
# DeepSpeed's launcher overwrites {VISIBLE_DEVICES_VARIABLE}; the workers restore it from this copy.
if [ -n "${{{VISIBLE_DEVICES_VARIABLE}+set}}" ]; then
    export {KEPT_DEVICES_VARIABLE}="${VISIBLE_DEVICES_VARIABLE}"
fi"""


class DeepspeedLauncher(ProcessLauncher):
    """`deepspeed`, with its runners pdsh, openmpi, mpich and slurm for several hosts."""

    summary = "the default; on several hosts by pdsh over ssh, or another `--runner`"
    options = frozenset({"runner"})
    runners = ("pdsh", "openmpi", "mpich", "slurm")

    def starts_mpi(self, runner: str | None) -> bool:
        """Return whether the runner is one of MPI or Slurm."""
        return runner not in (None, "pdsh")

    def command(self, request: LaunchRequest, base: Mapping[str, str]) -> Command:
        """Return the command.

        On this host, the launcher overwrites CUDA_VISIBLE_DEVICES with 0 to N-1. The user's value is passed on as
        DIST_MOE_VISIBLE_DEVICES, from which the worker restores it.

        Raises:
            LaunchError: DeepSpeed is not installed, or `cluster_command` raises it.
        """
        if request.cluster is not None:
            return cluster_command(request, request.cluster, request.runner or self.runners[0], base)
        environment = worker_environment(request.config, request.workers, base)
        if VISIBLE_DEVICES_VARIABLE in base:
            environment[KEPT_DEVICES_VARIABLE] = base[VISIBLE_DEVICES_VARIABLE]
        if not has_devices():
            # Otherwise each of DeepSpeed's processes searches for a device, and warns that it uses the CPU.
            variable = deepspeed_host.ACCELERATOR_VARIABLE
            environment[variable] = base.get(variable, "cpu")
        return Command("deepspeed", host_argv(request, free_port()), environment)

    def files(self, request: LaunchRequest) -> Mapping[str, str]:
        """Return a script for one machine, and one that reaches several hosts by pdsh."""
        worker = ("train", shell_variable("CONFIG"), *request.overrides, ALL_ARGUMENTS)
        program = f"{shell_variable('BIN')}/deepspeed"
        one = script_argv(PYTHON, program, worker, workers=shell_variable("WORKERS"), port=shell_variable("PORT"))
        hosts = cluster_argv(
            PYTHON,
            program,
            ("--module", "dist_moe", *worker),
            runner="pdsh",
            hostfile=shell_variable("HOSTFILE"),
            address=shell_variable("FIRST"),
            port=shell_variable("PORT"),
            ssh_port=request.config.cluster.ssh_port,
        )
        return {
            "one_machine/deepspeed.sh": one_machine_script(
                request,
                "deepspeed",
                shell_exports(worker_variables(shell_variable("THREADS"))),
                shell_command(one),
                prepare=KEEP_DEVICES_SCRIPT,
            ),
            "several_hosts/deepspeed.sh": several_hosts_script(
                request,
                "deepspeed",
                where="on the first host",
                exports=shell_exports(
                    {ENVIRONMENT_FILE: shell_variable("ENVIRONMENT"), **pdsh_variables(request.config.cluster)}
                ),
                command=shell_command(hosts),
            ),
        }


def host_argv(request: LaunchRequest, port: int) -> tuple[str, ...]:
    """Return the command for workers that all run on this host.

    It is what the program `deepspeed` would start after it has looked for hosts and devices, which takes 2.7 s.

    Args:
        request: The job.
        port: The port where the workers meet.

    Raises:
        LaunchError: DeepSpeed is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise _not_installed(f"{sys.executable} finds no module deepspeed")
    devices = json.dumps({"localhost": list(range(request.workers))})
    arguments = (
        f"--world_info={base64.urlsafe_b64encode(devices.encode()).decode()}",
        *("--master_addr", LOOPBACK, "--master_port", str(port)),
        *("--log_level", "error", "--no_local_rank"),
        *("--module", request.module),
    )
    return (sys.executable, "-m", deepspeed_host.__name__, *arguments, *request.worker_arguments)


def script_argv(
    python: str, program: str, worker_arguments: Sequence[str], *, workers: str, port: str
) -> tuple[str, ...]:
    """Return the command of a script for one host, by the program `deepspeed`, whose arguments a person can read."""
    arguments = (
        # A hostfile of another job at the default place would send this job to its hosts.
        *("--hostfile", os.devnull),
        *("--num_accelerators", workers),
        *("--master_addr", LOOPBACK, "--master_port", port),
        *("--log_level", "error", "--no_local_rank"),
        *("--module", "dist_moe"),
    )
    return (python, program, *arguments, *worker_arguments)


def cluster_command(request: LaunchRequest, cluster: Cluster, runner: str, base: Mapping[str, str]) -> Command:
    """Return the command for the hosts of a cluster, which reads a hostfile and more from `run.dir/launch`.

    Args:
        request: The job.
        cluster: The hosts.
        runner: One of DeepSpeed's runners: pdsh, openmpi, mpich or slurm.
        base: The environment to start from.

    Raises:
        LaunchError: The runner cannot start this job: devices other than the first ones (all but pdsh), different
            numbers of workers (mpich, slurm), an MPI other than the runner's, or a value that pdsh would pass to a
            shell unquoted.
    """
    folder = Path(request.config.run.dir).absolute() / "launch"
    require_ipv4(cluster, f"--runner {runner}")
    first, settings = cluster.hosts[0], cluster.settings
    # DeepSpeed writes the variables of its environment file into argument lists, which everybody on the host can read.
    secret = forwarded_env(request.config, cluster, base)
    public = {name: secret.pop(name) for name in list(secret) if name not in secret_names(settings)}
    held = private_path("variables", "/tmp")  # the TMPDIR of this host need not exist on the others
    public |= {LAUNCH_VARIABLE: f"{SCHEME}{held}"} if secret else {}
    if runner != "pdsh":
        require_first_devices(cluster, f"--runner {runner}", same_count=runner in ("mpich", "slurm"))
        public |= {"MASTER_ADDR": first.address, "MASTER_PORT": str(settings.port)}
    shell_words = [cluster.folder, cluster.python, *request.worker_arguments] if runner == "pdsh" else []
    require_shell_safe("DeepSpeed's launcher", [*shell_words, *public.values()])
    hostfile, variables = folder / "hostfile", folder / "environment"
    files = {
        hostfile: "".join(f"{host.name} slots={max(host.devices) + 1}\n" for host in cluster.hosts),
        variables: "".join(f"{name}={value}\n" for name, value in public.items()),
    }
    environment = launcher_environment(base, public) | {ENVIRONMENT_FILE: str(variables)}
    if runner == "pdsh":
        environment |= pdsh_variables(settings)
    if runner == "openmpi":
        environment |= openmpi_environment(cluster.ssh_options)
    if runner in MPI_RUNNERS:
        environment = without_allocation(environment) | public
        program, wrapper = _mpirun(MPI_RUNNERS[runner], folder, launcher_environment(base, public | secret))
        environment["PATH"] = f"{program.parent}{os.pathsep}{environment['PATH']}"
        files |= wrapper
    options: dict[str, Callable[[], Sequence[str]]] = {
        "openmpi": lambda: [*root_option("OpenMPI"), *openmpi_options("1", has_cores=False), *openmpi_network(cluster)],
        "mpich": lambda: mpich_options("1", has_cores=False),
        "slurm": lambda: slurm_options(cluster),
    }
    argv = cluster_argv(
        sys.executable,
        _installed_program(),
        (*_worker_program(runner, cluster), *request.worker_arguments),
        runner=runner,
        hostfile=str(hostfile),
        address=first.address,
        port=str(settings.port),
        ssh_port=settings.ssh_port,
        include=_selection(cluster) if runner == "pdsh" else None,
        runner_options=options[runner]() if runner in options else None,
    )
    return Command("deepspeed", argv, environment, files=files, holders=_holders(cluster, held), held_variables=secret)


def _selection(cluster: Cluster) -> str:
    """Return the hosts and their devices as DeepSpeed's `--include` takes them."""
    return "@".join(f"{host.name}:{','.join(map(str, host.devices))}" for host in cluster.hosts)


def cluster_argv(
    python: str,
    program: str,
    worker: Sequence[str],
    *,
    runner: str,
    hostfile: str,
    address: str,
    port: str,
    ssh_port: int | None,
    include: str | None = None,
    runner_options: Sequence[str] | None = None,
) -> tuple[str, ...]:
    """Return the command for the hosts of a hostfile.

    Args:
        python: The path of Python.
        program: The path of the `deepspeed` script.
        worker: The program of each worker and its arguments.
        runner: How DeepSpeed reaches the hosts.
        hostfile: The path of the hostfile.
        address: The address of the first host.
        port: The port where the workers meet.
        ssh_port: The port of the ssh servers, or None.
        include: The hosts and devices to use, or None for all.
        runner_options: The options of the runner's program, or None.
    """
    arguments = (
        *("--hostfile", hostfile),
        *(() if include is None else ("--include", include)),
        *("--launcher", runner, "--force_multi", "--no_ssh_check"),
        *(() if runner_options is None else (f"--launcher_args={shlex.join(runner_options)}",)),
        *(() if ssh_port is None else ("--ssh_port", str(ssh_port))),
        *("--master_addr", address, "--master_port", port),
        *("--log_level", "error", "--no_local_rank"),
    )
    return (python, program, *arguments, *worker)


def pdsh_variables(settings: ClusterConfig) -> dict[str, str]:
    """Return the environment of pdsh: reach the hosts by ssh, never ask, and give up on a host that does not answer."""
    user = () if settings.ssh_user is None else ("-l", settings.ssh_user)
    options = (f"-o BatchMode=yes -o ConnectTimeout={CONNECT_LIMIT_S}", *user)
    return {"PDSH_SSH_ARGS_APPEND": " ".join(options), "PDSH_RCMD_TYPE": "ssh"}


def _holders(cluster: Cluster, path: Path) -> dict[str, tuple[str, ...]]:
    """Return the command for each host that keeps the secret variables of its workers in the file `path`."""
    keep = (cluster.python, "-m", "dist_moe.launch.supervise.secret_file", str(path))
    return {
        host.name: ("env", "-C", cluster.folder, *keep)
        if host.is_here
        else cluster.ssh(host, keep, {"PYTHONSAFEPATH": "1"})
        for host in cluster.hosts
    }


def secret_names(settings: ClusterConfig) -> set[str]:
    """Return the names of the variables that other users must not read: those of the user, and that with the token."""
    return {*settings.environment, LAUNCH_VARIABLE}


def _mpirun(family: str, folder: Path, environment: Mapping[str, str]) -> tuple[Path, dict[Path, str]]:
    """Return the `mpirun`, by that name, of the MPI that the workers load, and the file that it needs."""
    library = loaded_mpi(environment)
    if library.family != family:
        raise LaunchError(
            f"--runner {family.lower()} needs {family}, and mpi4py loads {library}; let it load {family} "
            "(MPI4PY_LIBMPI), or use another runner"
        )
    program = Path(mpirun_of(library, environment))
    if program.name == "mpirun":
        return program, {}
    # Not a link: MPICH looks for its other programs in the folder by whose path it was called.
    wrapper = folder / "bin" / "mpirun"
    return wrapper, {wrapper: f'#!/bin/sh\nexec {shlex.quote(str(program))} "$@"\n'}


def _worker_program(runner: str, cluster: Cluster) -> tuple[str, ...]:
    """Return what starts a worker: the slurm runner drops --module, and the mpich runner gives it to another script."""
    if runner in ("slurm", "mpich"):
        return (str(Path(cluster.python).parent / "dist-moe"),)
    return ("--module", "dist_moe")


def slurm_options(cluster: Cluster) -> tuple[str, ...]:
    """Return the options by which `srun` spreads the workers; by default it uses as few nodes as possible."""
    names = ",".join(host.name for host in cluster.hosts)
    each = str(len(cluster.hosts[0].devices))
    nodes = ("--nodes", str(len(cluster.hosts)), "--nodelist", names, "--ntasks-per-node", each)
    return (*nodes, "--kill-on-bad-exit=1")


def _installed_program() -> str:
    program = Path(sys.executable).parent / "deepspeed"
    if not program.is_file():
        raise _not_installed(f"{program} does not exist")
    return str(program)


def _not_installed(found: str) -> LaunchError:
    """Return the error for a Python without DeepSpeed."""
    remedy = f"install deepspeed for {sys.executable}, or use --launcher torchrun"
    return LaunchError(f"{found}, and --launcher deepspeed needs it; {remedy}")


LAUNCHER = DeepspeedLauncher()
