"""The rank of this process and the size of its job, read from the environment that a launcher sets.

It imports no torch, so that a worker knows its rank, and errors can name it, before the slow imports begin.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dist_moe.errors import UserError
from dist_moe.worker.launcher_variables import LAUNCHERS, Place, read_number, read_place, slurm_step, tasks_of_nodes

UNSET = "unset RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE"
BY_TORCHRUN = "start the workers by torchrun, which reads these variables, as `torchrun -m dist_moe train CONFIG`"


class RankInfoError(UserError, ValueError):
    """The environment names a rank that cannot exist (value, rule and remedy in the message)."""


@dataclass(frozen=True)
class RankInfo:
    """The place of one worker in the job.

    Attributes:
        rank: Rank among the workers of all hosts.
        world_size: Number of workers on all hosts.
        local_rank: Rank among the workers of this host.
        local_world_size: Number of workers on this host.
        launcher: The launcher that the values come from, a name of `LAUNCHERS` ("env" is deepspeed's and torchrun's),
            or "none" for a single process that no launcher started.
        notes: What was ignored in the environment and why, a line each.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: str = "none"
    notes: tuple[str, ...] = field(default=(), compare=False)


def rank_info_from_env(environment: Mapping[str, str], *, alone_in_batch: bool = False) -> RankInfo:
    """Read the worker's rank; without a launcher's variables it is rank 0 of 1.

    Where the variables of several launchers are set:

    - torchrun and DeepSpeed come first. The other launcher may have started one of them for each host, or the same
      workers, whose rank was exported by hand. Any other numbers are those of another job: an error, since either may
      be meant, and the wrong one makes workers that wait for each other, or that train the same run several times.
    - OpenMPI, MPICH and others that start daemons by srun come before Slurm.
    - Slurm comes before PMI, whose variables srun sets too, without a local rank.
    - One of these that describes a single process, such as a shell made by srun, is ignored.

    Args:
        environment: The variables, as in `os.environ`.
        alone_in_batch: Whether this process may be one that a batch script of Slurm with several tasks runs without
            srun; it is rank 0 of 1.

    Raises:
        RankInfoError: A value is not an integer, a rank is not below its world size, variables contradict each other,
            half of a set is missing, or a job of several workers has not been started as such.
    """
    faults: list[str] = []
    places = [place for names in LAUNCHERS if (place := read_place(environment, names, faults))]
    if slurm_step(environment) != "srun":
        places = [place for place in places if place.names.launcher != "slurm"]
    complete = [place for place in places if place.world_size is not None]
    notes: list[str] = []
    chosen = _choose(environment, complete, faults, notes)
    if faults:
        raise RankInfoError("\n".join(faults))
    if chosen is None:
        faults += _unstarted(environment, places, alone_in_batch, notes)
        if faults:
            raise RankInfoError("\n".join(faults))
        return RankInfo(notes=tuple(notes))
    notes += _ignored_halves(environment, chosen)
    return _checked(environment, chosen, places, tuple(notes))


def _choose(
    environment: Mapping[str, str], complete: Sequence[Place], faults: list[str], notes: list[str]
) -> Place | None:
    """Return the place that counts among those with rank and world size; add contradictions to `faults`."""
    several = [place for place in complete if place.world_size != 1 or place.names.launcher == "env"] or complete
    if not several:
        return None
    chosen = several[0]
    agreeing = [place for place in complete if (place.rank, place.world_size) == (chosen.rank, chosen.world_size)]
    for other in complete:
        if other in agreeing or other.world_size == 1:
            continue
        if any(_started_by(environment, place, other) for place in agreeing):
            continue
        if other.names.launcher == "pmi" and any(place.names.launcher == "slurm" for place in agreeing):
            notes.append(f"{other} is ignored, since srun started this process as {chosen}")
            continue
        remedy = UNSET if chosen.names.launcher == "env" else f"unset {other.names.rank} and {other.size_name}"
        faults.append(
            f"{chosen} contradicts {other}, and a worker has one rank; {remedy} if left from another job, else "
            "start the workers with one of the two launchers, or torchrun once on each host (srun --ntasks-per-node=1)"
        )
    return chosen


def _started_by(environment: Mapping[str, str], inner: Place, outer: Place) -> bool:
    """Whether the tasks of `outer` can be what started the workers of `inner`."""
    if inner.names.launcher == "env":
        # torchrun's number of hosts, and DeepSpeed's: each is one task of the outer launcher.
        hosts = [read_number(environment, name, []) for name in ("GROUP_WORLD_SIZE", "CROSS_SIZE")]
        return any((number or 0) > 1 for number in hosts)
    return inner.names.starts_daemons and outer.names.launcher in ("slurm", "pmi")


def _checked(
    environment: Mapping[str, str], chosen: Place, places: Sequence[Place], notes: tuple[str, ...]
) -> RankInfo:
    """Return the rank info of a place, with local numbers from another one that agrees where it has none."""
    world_size = chosen.world_size
    assert world_size is not None
    agreeing = [
        place
        for place in places
        if (place.rank == chosen.rank and place.world_size in (None, world_size))
        and (place.local_rank is not None and chosen.local_rank in (None, place.local_rank))
    ]
    if None in (chosen.local_rank, chosen.local_world_size) and agreeing:
        local = max(agreeing, key=lambda place: place.local_world_size is not None)
        chosen = replace(
            chosen,
            names=chosen.names._replace(local_rank=local.names.local_rank),
            local_rank=local.local_rank,
            local_world_size=local.local_world_size,
            local_size_name=local.local_size_name,
        )
    local_rank, local_world_size = _local_numbers(environment, chosen)
    faults = list(_impossible(chosen, local_rank, local_world_size))
    if faults:
        raise RankInfoError("\n".join(faults))
    return RankInfo(chosen.rank, world_size, local_rank, local_world_size, chosen.names.launcher, notes)


def _local_numbers(environment: Mapping[str, str], place: Place) -> tuple[int, int]:
    """Return local rank and local world size, where the launcher did not set one or both of them.

    Raises:
        RankInfoError: They are needed and cannot be derived.
    """
    assert place.world_size is not None
    local_rank, size = place.local_rank, place.local_world_size
    if local_rank is None and (place.world_size == 1 or size == 1):
        local_rank = 0
    if local_rank is None and place.names.launcher == "env" and size is None:
        per_host = (read_number(environment, "PET_NPROC_PER_NODE", []) or 1, environment.get("PET_NPROC_PER_NODE"))
        if per_host[0] > 1:
            raise RankInfoError(
                f"{place} comes with PET_NPROC_PER_NODE={per_host[1]}, so it is the rank of a pod; {BY_TORCHRUN}"
            )
        # One worker for each pod, as PyTorchJob starts it.
        return 0, 1
    if local_rank is None:
        raise RankInfoError(
            f"{place} comes without {place.names.local_rank}, so that all workers of a host would use its first "
            "device; set LOCAL_RANK and LOCAL_WORLD_SIZE together with RANK and WORLD_SIZE, or use another launcher"
        )
    if size is not None:
        return local_rank, size
    if place.names.launcher != "env":
        # This rank knows only of the local ranks up to itself.
        return local_rank, local_rank + 1
    if local_rank != place.rank:
        raise RankInfoError(
            f"LOCAL_RANK={local_rank} of {place} comes without LOCAL_WORLD_SIZE, the number of workers on this host; "
            "set it too, or start the workers with torchrun"
        )
    return local_rank, place.world_size


def _impossible(place: Place, local_rank: int, local_world_size: int) -> Iterator[str]:
    """Yield what cannot be: a rank or number that is not below another."""
    remedy = "unset both, or start the worker with a launcher"
    world_size, names = place.world_size, place.names
    assert world_size is not None
    if not place.rank < world_size:
        yield f"{names.rank}={place.rank} must be below {place.size_name}={world_size}; {remedy}"
    if not local_rank < local_world_size:
        yield f"{names.local_rank}={local_rank} must be below {place.local_size_name}={local_world_size}; {remedy}"
    if local_world_size > world_size and place.local_world_size is not None:
        yield f"{place.local_size_name}={local_world_size} must not be above {place.size_name}={world_size}; {remedy}"
    if local_rank > place.rank and place.rank < world_size:
        yield f"{names.local_rank}={local_rank} must not be above {names.rank}={place.rank}; {remedy}"


def _ignored_halves(environment: Mapping[str, str], chosen: Place) -> Iterator[str]:
    """Yield a line for each of torchrun's variables that another launcher's numbers contradict."""
    if chosen.names.launcher == "env":
        return
    own = {"RANK": chosen.rank, "WORLD_SIZE": chosen.world_size}
    if all(environment.get(name) for name in own):
        return
    for name, number in own.items():
        if environment.get(name) and environment[name] != str(number):
            starter = chosen.names.launcher
            yield f"{name}={environment[name]} is ignored, since {starter} started this worker as {chosen}"


def _unstarted(
    environment: Mapping[str, str], places: Sequence[Place], alone_in_batch: bool, notes: list[str]
) -> Iterator[str]:
    """Yield why a process without rank and world size is not a job of its own; what is harmless becomes a note."""
    for place in places:
        if place.rank > 0 or place.names.launcher != "env":
            needed = " or ".join(place.names.world_size)
            yield f"{place} comes without {needed}; set both (with MASTER_ADDR and MASTER_PORT), or unset it"
        else:
            notes.append(f"{place} is ignored, since WORLD_SIZE is not set")
    faults: list[str] = []
    size = read_number(environment, "WORLD_SIZE", faults)
    yield from faults
    if size is not None and not any(place.names.launcher == "env" for place in places):
        if size > 1:
            yield f"WORLD_SIZE={size} comes without RANK; start the workers with a launcher, or unset WORLD_SIZE"
        else:
            notes.append(f"WORLD_SIZE={size} is ignored, since RANK is not set")
    if not any(environment.get(name) for name in ("RANK", "WORLD_SIZE")):
        halves = {name: environment.get(name, "") for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE")}
        notes += [
            f"{name}={value} is ignored, since RANK and WORLD_SIZE are not set"
            for name, value in halves.items()
            if value not in ("", "0", "1")
        ]
    yield from _unstarted_pod(environment, notes)
    yield from _unstarted_slurm(environment, alone_in_batch, notes)


def _unstarted_pod(environment: Mapping[str, str], notes: list[str]) -> Iterator[str]:
    """Yield why a pod of several is not a job of its own."""
    for name in ("PET_NNODES", "PET_NPROC_PER_NODE"):
        # PET_NNODES may be MIN:MAX.
        number = environment.get(name, "").rpartition(":")[2].strip()
        if number.isdecimal() and int(number) > 1:
            yield f"{name}={environment[name]} asks for several workers, and none of them has a RANK; {BY_TORCHRUN}"
    if environment.get("PMIX_RANK") and environment.get("PMIX_NAMESPACE"):
        yield (
            f"PMIX_RANK={environment['PMIX_RANK']} comes without a number of workers; start them with OpenMPI's mpirun "
            "or with srun, or set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE"
        )
    index = environment.get("JOB_COMPLETION_INDEX", "")
    if index not in ("", "0"):
        yield (
            f"JOB_COMPLETION_INDEX={index} is the number of a pod of an Indexed Job or JobSet, and no launcher has set "
            "RANK and WORLD_SIZE; run `torchrun --nnodes PODS --node-rank $JOB_COMPLETION_INDEX --master-addr "
            "FIRST_POD` in each pod (`dist-moe launch --launcher kubernetes` writes such a Job), or unset it for "
            "independent runs"
        )
    elif index:
        notes.append("JOB_COMPLETION_INDEX=0 without RANK and WORLD_SIZE: this pod trains alone")


def _unstarted_slurm(environment: Mapping[str, str], alone_in_batch: bool, notes: list[str]) -> Iterator[str]:
    """Yield why a process of a batch script is not a job of its own.

    In the shell of salloc a person starts one process and reads the note. A batch script that does so, with several
    tasks, would hold the nodes for a run of one worker.
    """
    step = slurm_step(environment)
    tasks = sum(tasks_of_nodes(environment.get("SLURM_TASKS_PER_NODE", "")))
    text = environment.get("SLURM_NTASKS", "")
    name, number = ("SLURM_NTASKS", int(text)) if text.isdecimal() else ("SLURM_TASKS_PER_NODE", tasks)
    value = environment.get(name, "")
    if number <= 1 or step not in ("batch", "shell"):
        return
    where = "the batch script" if step == "batch" else "a shell"
    if step == "batch" and not alone_in_batch:
        yield (
            f"{name}={value} in {where} of Slurm job {environment.get('SLURM_JOB_ID')}, and srun has not started this "
            "process, so the other workers would never come; write `srun python -m dist_moe train CONFIG` in the "
            "script, or `dist-moe launch CONFIG --workers N` for the workers of one node (`srun --ntasks=1` for one "
            "worker alone)"
        )
        return
    notes.append(f"{name}={value} is ignored, since {where} and not srun started this process: it is one worker alone")
