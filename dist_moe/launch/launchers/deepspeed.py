"""The command of DeepSpeed's own launcher, for workers on this host and on several."""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dist_moe.config.schema import Config
from dist_moe.errors import needs_folder
from dist_moe.launch.cluster import (
    Cluster,
    forwarded_env,
    launcher_environment,
    require_first_devices,
    require_shell_safe,
)
from dist_moe.launch.command import (
    Command,
    LaunchError,
    has_devices,
    worker_arguments,
    worker_environment,
)
from dist_moe.launch.launchers.mpirun import (
    loaded_mpi,
    mpich_options,
    mpirun_of,
    openmpi_environment,
    openmpi_network,
    openmpi_options,
)
from dist_moe.worker.network import LOOPBACK, free_port

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
KEPT_DEVICES = "DIST_MOE_VISIBLE_DEVICES"
# Names the file of variables that DeepSpeed takes to other hosts.
DEEPSPEED_VARIABLES = "DS_ENV_FILE"
MPI_RUNNERS = {"openmpi": "OpenMPI", "mpich": "MPICH"}


def deepspeed_command(
    config: Config,
    workers: int,
    config_path: str | Path,
    overrides: Sequence[str] = (),
    module: str = "dist_moe",
    base: Mapping[str, str] = os.environ,
) -> Command:
    """`deepspeed`, which starts `workers` processes `python -m MODULE train CONFIG_PATH OVERRIDES`.

    The launcher writes 0 to N-1 into CUDA_VISIBLE_DEVICES, whatever stood there. What stood there goes along
    as DIST_MOE_VISIBLE_DEVICES, and the worker puts it back.

    base: the environment to start from. A LaunchError if this Python has no `deepspeed` beside it.
    """
    program = _program()
    environment = worker_environment(config, workers, base)
    if VISIBLE_DEVICES in base:
        environment[KEPT_DEVICES] = base[VISIBLE_DEVICES]
    if not has_devices():
        # Each of DeepSpeed's processes would look for a device, and warn of the CPU that it falls back to.
        environment["DS_ACCELERATOR"] = base.get("DS_ACCELERATOR", "cpu")
    arguments = [
        # A list of hosts that another job keeps at the default place would send this one to those hosts.
        *("--hostfile", os.devnull),
        *("--num_accelerators", str(workers)),
        *("--master_addr", LOOPBACK),
        *("--master_port", str(free_port())),
        *("--log_level", "error"),
        "--no_local_rank",
        "--module",
        module,
    ]
    argv = (sys.executable, program, *arguments, *worker_arguments(config_path, overrides))
    return Command("deepspeed", argv, environment)


def deepspeed_cluster_command(
    config: Config,
    cluster: Cluster,
    config_path: str | Path,
    overrides: Sequence[str] = (),
    runner: str = "pdsh",
    base: Mapping[str, str] = os.environ,
) -> Command:
    """`deepspeed` over the hosts of `cluster`, by one of its runners: pdsh, openmpi, mpich or slurm.

    The hosts that are left and the variables that go along are written to `launch/` in `run.dir`. LaunchError for what
    the runner cannot do: devices other than the first ones (all but pdsh), different numbers of workers (mpich, slurm),
    another MPI than the runner's, and anything that pdsh would hand to a shell unquoted.
    """
    folder = Path(config.run.dir).absolute() / "launch"
    with needs_folder(folder.parent):
        folder.mkdir(parents=True, exist_ok=True)
    first, settings = cluster.hosts[0], cluster.settings
    carried = forwarded_env(config, cluster, base)
    if runner != "pdsh":
        require_first_devices(cluster, f"--runner {runner}", alike=runner in ("mpich", "slurm"))
        carried |= {"MASTER_ADDR": first.address, "MASTER_PORT": str(settings.port)}
    words = worker_arguments(config_path, overrides)
    shell = [cluster.folder, cluster.python, *words] if runner == "pdsh" else []
    require_shell_safe("DeepSpeed's launcher", [*shell, *carried.values()])
    hostfile, variables = folder / "hostfile", folder / "environment"
    hostfile.write_text("".join(f"{host.name} slots={max(host.devices) + 1}\n" for host in cluster.hosts))
    variables.unlink(missing_ok=True)
    variables.touch(mode=0o600)  # what the user lets go along may be secret
    variables.write_text("".join(f"{name}={value}\n" for name, value in carried.items()))
    environment = launcher_environment(base, carried) | {DEEPSPEED_VARIABLES: str(variables)}
    if runner == "pdsh":
        user = () if settings.ssh_user is None else ("-l", settings.ssh_user)
        environment["PDSH_SSH_ARGS_APPEND"] = " ".join(["-o BatchMode=yes -o ConnectTimeout=10", *user])
        environment["PDSH_RCMD_TYPE"] = "ssh"
    if runner == "openmpi":
        environment |= openmpi_environment(cluster.ssh_options)
    if runner in MPI_RUNNERS:
        environment["PATH"] = _path_to_mpirun(MPI_RUNNERS[runner], folder, environment)
    options = {
        "openmpi": [*openmpi_options(1, has_cores=False), *openmpi_network(cluster)],
        "mpich": mpich_options(1, False),
        "slurm": slurm_options(cluster),
    }
    inside = [f"{host.name}:{','.join(map(str, host.devices))}" for host in cluster.hosts]
    arguments = [
        *("--hostfile", str(hostfile)),
        *(("--include", "@".join(inside)) if runner == "pdsh" else ()),
        *("--launcher", runner, "--force_multi", "--no_ssh_check"),
        *((f"--launcher_args={shlex.join(options[runner])}",) if runner in options else ()),
        *(("--ssh_port", str(settings.ssh_port)) if settings.ssh_port is not None else ()),
        *("--master_addr", first.address, "--master_port", str(settings.port)),
        *("--log_level", "error"),
        "--no_local_rank",
        *_worker_program(runner, cluster),
    ]
    return Command("deepspeed", (sys.executable, _program(), *arguments, *words), environment)


def _path_to_mpirun(family: str, folder: Path, environment: Mapping[str, str]) -> str:
    """A PATH whose first `mpirun`, which DeepSpeed calls by that name, is of the MPI that the workers load."""
    library = loaded_mpi(environment)
    if library.family != family:
        raise LaunchError(
            f"--runner {family.lower()} needs {family}, and mpi4py loads {library}; let it load {family} "
            "(MPI4PY_LIBMPI), or use another runner"
        )
    program = Path(mpirun_of(library, environment))
    if program.name != "mpirun":
        # No link: MPICH looks for its other programs beside the name that it was called by.
        caller = folder / "bin" / "mpirun"
        caller.parent.mkdir(exist_ok=True)
        caller.write_text(f'#!/bin/sh\nexec {shlex.quote(str(program))} "$@"\n', encoding="utf-8")
        caller.chmod(0o755)
        program = caller
    return f"{program.parent}{os.pathsep}{environment['PATH']}"


def _worker_program(runner: str, cluster: Cluster) -> tuple[str, ...]:
    """Slurm's runner forgets --module, and MPICH's gives it to DeepSpeed's own script."""
    if runner in ("slurm", "mpich"):
        return (str(Path(cluster.python).parent / "dist-moe"),)
    return ("--module", "dist_moe")


def slurm_options(cluster: Cluster) -> tuple[str, ...]:
    """Where `srun` puts the workers, which else packs them on as few nodes as hold them."""
    names = ",".join(host.name for host in cluster.hosts)
    each = str(len(cluster.hosts[0].devices))
    nodes = ("--nodes", str(len(cluster.hosts)), "--nodelist", names, "--ntasks-per-node", each)
    return (*nodes, "--kill-on-bad-exit=1")


def _program() -> str:
    program = Path(sys.executable).parent / "deepspeed"
    if not program.is_file():
        raise LaunchError(
            f"{program} is not there, and --launcher deepspeed needs it; "
            f"install deepspeed for {sys.executable}, or use --launcher torchrun"
        )
    return str(program)
