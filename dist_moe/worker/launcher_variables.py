"""The variables in which each launcher passes a worker its rank, and how they are read. Imports no torch.

The names and values are those of the launchers themselves: torchrun and DeepSpeed from their source, OpenMPI 4.1 and
5.0, MPICH 4.0 (Hydra) and Slurm 22.05 as printed by the workers that they start, the others from their documentation.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from dist_moe.text import shown


class LauncherVariables(NamedTuple):
    """The variables of one launcher; where there are several names for one number, the first that is set counts.

    Attributes:
        launcher: The name of the launcher.
        rank: The variable of the rank.
        world_size: Those of the number of workers.
        local_rank: That of the rank among the workers of this host.
        local_world_size: Those of the number of workers of this host.
        mark: A variable without which the others are not this launcher's, or None.
        starts_daemons: It may start daemons by srun: the numbers of Slurm are theirs then, not those of the workers.
    """

    launcher: str
    rank: str
    world_size: tuple[str, ...]
    local_rank: str
    local_world_size: tuple[str, ...] = ()
    mark: str | None = None
    starts_daemons: bool = False


# An inner launcher comes before the one that may have started it. Where several are complete, `rank_info_from_env`
# says what is done.
LAUNCHERS = (
    # torchrun; DeepSpeed's launcher, which sets LOCAL_SIZE; PyTorchJob, which sets no local variable.
    LauncherVariables("env", "RANK", ("WORLD_SIZE",), "LOCAL_RANK", ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")),
    LauncherVariables(
        "openmpi",
        "OMPI_COMM_WORLD_RANK",
        ("OMPI_COMM_WORLD_SIZE",),
        "OMPI_COMM_WORLD_LOCAL_RANK",
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
        starts_daemons=True,
    ),
    LauncherVariables(
        "mvapich",
        "MV2_COMM_WORLD_RANK",
        ("MV2_COMM_WORLD_SIZE",),
        "MV2_COMM_WORLD_LOCAL_RANK",
        ("MV2_COMM_WORLD_LOCAL_SIZE",),
        starts_daemons=True,
    ),
    LauncherVariables(
        "jsrun",
        "JSM_NAMESPACE_RANK",
        ("JSM_NAMESPACE_SIZE",),
        "JSM_NAMESPACE_LOCAL_RANK",
        ("JSM_NAMESPACE_LOCAL_SIZE",),
        starts_daemons=True,
    ),
    # Hydra, the mpiexec of MPICH and of Intel MPI: it alone sets MPI_LOCALRANKID. Under Slurm it starts its proxies by
    # srun, so that its workers see the numbers of the proxies' step too.
    LauncherVariables(
        "mpich", "PMI_RANK", ("PMI_SIZE",), "MPI_LOCALRANKID", ("MPI_LOCALNRANKS",), "MPI_LOCALRANKID", True
    ),
    LauncherVariables("flux", "FLUX_TASK_RANK", ("FLUX_JOB_SIZE",), "FLUX_TASK_LOCAL_ID", starts_daemons=True),
    # The mpiexec of HPE Cray systems with PBS.
    LauncherVariables(
        "pals",
        "PALS_RANKID",
        ("PALS_SIZE", "PMI_SIZE"),
        "PALS_LOCAL_RANKID",
        ("PALS_LOCAL_SIZE", "PMI_LOCAL_SIZE"),
        starts_daemons=True,
    ),
    # The number of the step is that of this srun; the number of the job may be larger.
    LauncherVariables("slurm", "SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), "SLURM_LOCALID"),
    # Any other launcher that uses PMI. srun --mpi=pmi2 does, and Slurm's own numbers come before these.
    LauncherVariables("pmi", "PMI_RANK", ("PMI_SIZE",), "PMI_LOCAL_RANK", ("PMI_LOCAL_SIZE",)),
)
MAX_DIGITS = 18
TASKS_OF_NODES = re.compile(r"(\d+)(?:\(x(\d+)\))?")
# Slurm's numbers of the steps that are not made by an srun of the user: the batch script, and the shell of salloc.
BATCH_STEP, INTERACTIVE_STEP = "4294967291", "4294967290"
SLURM_STEP = ("SLURM_STEP_ID", "SLURM_STEPID")


@dataclass(frozen=True)
class Place:
    """What the variables of one launcher say; None for a number that is not set.

    Attributes:
        names: The variables.
        rank: The rank.
        world_size: The number of workers.
        local_rank: The rank on this host.
        local_world_size: The number of workers on this host.
        size_name: The variable of `world_size`.
        local_size_name: The variable of `local_world_size`.
    """

    names: LauncherVariables
    rank: int
    world_size: int | None
    local_rank: int | None
    local_world_size: int | None
    size_name: str
    local_size_name: str

    def __str__(self) -> str:
        size = "" if self.world_size is None else f" of {self.size_name}={self.world_size}"
        return f"{self.names.rank}={self.rank}{size}"


def read_number(environment: Mapping[str, str], name: str, faults: list[str]) -> int | None:
    """Return the value of a variable, or None where it is not set or empty; add to `faults` what is not a number."""
    text = environment.get(name, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdecimal()):
        faults.append(
            f"{name}={environment[name]!r} is not an integer >= 0; start the worker with a launcher, which sets this "
            "variable, or unset it"
        )
        return None
    # Python refuses to read thousands of digits.
    return int(text) if len(text) <= MAX_DIGITS else 10**MAX_DIGITS


def read_port(environment: Mapping[str, str], name: str, faults: list[str]) -> int | None:
    """Return the TCP port in a variable; None where it is not set or empty, or, with an entry in `faults`, none."""
    port = read_number(environment, name, faults)
    if port is None or 0 < port < 1 << 16:
        return port
    faults.append(f"{name}={shown(environment[name])} is no port from 1 to 65535; set it to that of rank 0's store")
    return None


def first_set(environment: Mapping[str, str], names: tuple[str, ...]) -> str:
    """Return the first of these variables that is set, else the first."""
    return next((name for name in names if environment.get(name, "").strip()), names[0] if names else "")


def read_place(environment: Mapping[str, str], names: LauncherVariables, faults: list[str]) -> Place | None:
    """Return what the variables of a launcher say, or None where it set no rank."""
    if names.mark is not None and names.mark not in environment:
        return None
    size_name, local_name = (first_set(environment, of) for of in (names.world_size, names.local_world_size))
    rank = read_number(environment, names.rank, faults)
    world_size = read_number(environment, size_name, faults)
    local_rank = read_number(environment, names.local_rank, faults)
    local_world_size = read_number(environment, local_name, faults) if local_name else None
    if rank is None:
        return None
    if names.launcher == "slurm":
        world_size, local_world_size, local_name = slurm_sizes(environment, world_size, faults)
    if names.launcher == "flux" and world_size is not None:
        nodes = read_number(environment, "FLUX_JOB_NNODES", faults)
        local_name = "FLUX_JOB_NNODES"
        local_world_size = world_size // nodes if nodes and world_size % nodes == 0 else None
    return Place(names, rank, world_size, local_rank, local_world_size, size_name, local_name)


def slurm_sizes(
    environment: Mapping[str, str], world_size: int | None, faults: list[str]
) -> tuple[int | None, int | None, str]:
    """Return the number of tasks, that on this node, and the variable of the latter.

    SLURM_NTASKS is set only where the job was given a number of tasks, and SLURM_NTASKS_PER_NODE is what it asked for;
    SLURM_STEP_TASKS_PER_NODE is what it got, such as `2(x3),1` for three nodes with two tasks and one with one.
    """
    node = read_number(environment, "SLURM_NODEID", faults)
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        tasks = tasks_of_nodes(environment.get(name, ""))
        if tasks and world_size in (None, sum(tasks)):
            return sum(tasks), tasks[node] if node is not None and node < len(tasks) else None, name
    per_node = read_number(environment, "SLURM_NTASKS_PER_NODE", faults)
    return world_size, per_node if per_node and per_node <= (world_size or 0) else None, "SLURM_NTASKS_PER_NODE"


def tasks_of_nodes(text: str) -> list[int]:
    """Return the number of tasks of each node in Slurm's notation, `2(x3),1`; nothing for another text."""
    parts = [TASKS_OF_NODES.fullmatch(part) for part in text.split(",")]
    if not all(parts):
        return []
    return [int(part[1]) for part in parts if part for _ in range(int(part[2] or 1))]


def slurm_step(environment: Mapping[str, str]) -> str:
    """Return how Slurm started this process.

    Returns:
        "srun" for a task of an srun, "batch" for the batch script itself or what it runs without srun, "shell" for the
        shell of salloc, "" outside of Slurm.
    """
    step = environment.get(first_set(environment, SLURM_STEP), "")
    if step == INTERACTIVE_STEP:
        return "shell"
    if step not in ("", BATCH_STEP):
        return "srun"
    if "SLURM_JOB_ID" not in environment:
        return "srun" if "SLURM_PROCID" in environment else ""
    if "SLURM_PROCID" not in environment:
        return "shell"
    # A container may be given the variables of a task without the number of its step; a batch script has rank 0.
    return "batch" if environment["SLURM_PROCID"] == "0" else "srun"
