"""The CPU of a worker: the cores that it is bound to, and the memory that it keeps. Imports no torch."""

import contextlib
import ctypes
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from dist_moe.text import counted, listed
from dist_moe.worker.rank_info import RankInfo

logger = logging.getLogger(__name__)

TOPOLOGY = Path("/sys/devices/system/cpu")
# Parameters of mallopt, from glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
NEVER = -1
LARGEST_KEPT_BYTES = (128 << 20, 32 << 20)
"""Larger allocations are mapped one by one, as by default: they are few, and would leave gaps, which cost memory. An
older glibc refuses the first number, and accepts the second."""


@contextlib.contextmanager
def bound_to_cores(rank_info: RankInfo, threads: int, affinities: Sequence[set[int]] = ()) -> Iterator[set[int]]:
    """Bind this thread, and those that it starts, to the worker's share of the cores, for the length of the context.

    The shares of the workers of a host are disjoint and cover all cores that this process may use. Nothing is bound
    where the workers may not all use the same cores, since then the launcher has bound them, and where the cores are
    fewer than the workers' threads, which the kernel balances better. Without binding, the kernel may move two workers
    to one core for a moment, for which the others wait in the next collective.

    Args:
        rank_info: The rank of this worker, and the number of workers of this host.
        threads: The number of torch's threads of each worker.
        affinities: The cores that each worker of this host may use, if they are known.

    Yields:
        The cores that this thread may use: all of them where the kernel refuses to bind it.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield set()
        return
    allowed, workers = os.sched_getaffinity(0), rank_info.local_world_size
    share = cores_of_worker(sort_cores(allowed), rank_info.local_rank, workers)
    if any(cores != allowed for cores in affinities):
        logger.info("%s, as the launcher has bound this worker (run.bind_cores)", _named(allowed))
        yield allowed
        return
    if workers == 1 or len(allowed) < workers * threads:
        yield allowed
        return
    if not _bind(share):
        yield allowed
        return
    logger.info("bound to %s of %s (run.bind_cores)", _named(share), counted(len(allowed), "core"))
    try:
        yield share
    finally:
        _bind(allowed)


def _bind(cores: set[int]) -> bool:
    """Bind this thread, and return whether the kernel permits it.

    A container may forbid the system call (seccomp), and its cores may change after they were read (a smaller cpuset).
    """
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        logger.warning("not bound to %s (run.bind_cores): %s", _named(cores), error)
        return False
    return True


def are_disjoint(affinities: Sequence[set[int]]) -> bool:
    """Return whether each of several workers has cores of its own, which a launcher has given it."""
    return len(affinities) > 1 and sum(map(len, affinities)) == len(set().union(*affinities))


def cores_of_worker(cores: list[int], worker: int, workers: int) -> set[int]:
    """Return the cores of one of the workers: consecutive ones, with as many for each worker as can be.

    Args:
        cores: All cores, in the order of `sort_cores`.
        worker: The number of the worker on its host.
        workers: The number of workers on the host.
    """
    first, end = (len(cores) * bound // workers for bound in (worker, worker + 1))
    return set(cores[first:end])


def sort_cores(cores: Iterable[int], topology: Path = TOPOLOGY) -> list[int]:
    """Sort logical cores by socket and physical core, so that hyperthreads of one core are neighbors.

    Args:
        cores: The numbers of logical cores.
        topology: The folder in which the kernel describes them; they are sorted by number where it does not.
    """

    def position(core: int) -> tuple[int, ...]:
        folder = topology / f"cpu{core}" / "topology"
        try:
            return (*(int((folder / name).read_text()) for name in ("physical_package_id", "core_id")), core)
        except (OSError, ValueError):
            return (0, 0, core)

    return sorted(cores, key=position)


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for later allocations of this process, instead of returning it to the kernel.

    By default glibc maps each tensor of more than 32 MiB anew, and returns what is free at the end of its heap. The
    kernel then clears each page again on its first use: 66,000 to 89,000 page faults in a step of a model of 23 M
    parameters.

    Returns:
        Whether it does; False with another C library, as on Alpine and macOS.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # The order matters: without a threshold for mapping, the other setting would leave it at 128 kiB.
    kept = any(mallopt(M_MMAP_THRESHOLD, size) for size in LARGEST_KEPT_BYTES) and bool(
        mallopt(M_TRIM_THRESHOLD, NEVER)
    )
    logger.info("freed memory is %s for later allocations (run.keep_memory)", "kept" if kept else "not kept")
    return kept


def _named(cores: set[int]) -> str:
    return f"{'core' if len(cores) == 1 else 'cores'} {listed(map(str, sorted(cores)), last='and', most=8)}"
