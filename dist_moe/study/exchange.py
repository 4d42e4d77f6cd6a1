"""The speed of the all-to-all: the MPI backend compared with gloo and with a copy in memory, in one job of mpirun.

Every rank sends an equal part to every rank. One repetition is ten consecutive all-to-alls of each backend, in
alternating order, so that other load on the host affects both equally. (A single all-to-all would mostly measure the
skew with which the ranks leave the barrier.)
"""

import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist
from rich.table import Table

from dist_moe.comm.init import init_distributed, set_threads
from dist_moe.study.tables import terminal_table
from dist_moe.worker.rank_info import rank_info_from_env

SIZES_BYTES = (1 << 10, 1 << 14, 1 << 18, 1 << 22, 1 << 24)
"""What one rank sends in total."""
WARM_UP = 3
CONSECUTIVE = 10
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Timing:
    """The median time of one all-to-all on the slowest rank.

    Attributes:
        size_bytes: What one rank sends in total, including its part to itself.
        times_us: By backend; "copy" is a copy of as many bytes on every rank at the same time, a lower bound for any
            exchange through the memory of one host.
    """

    size_bytes: int
    times_us: dict[str, float]

    def ratio(self, slower: str, faster: str) -> float:
        """Return how many times longer the slower one takes."""
        return self.times_us[slower] / self.times_us[faster]

    def bandwidth_gb_per_s(self, backend: str) -> float:
        """Return the bandwidth of what one rank sends, in 10^9 bytes per second."""
        return self.size_bytes / self.times_us[backend] / 1e3


def run(repetitions: int) -> list[Table]:
    """Join the job that mpirun started, and measure.

    Returns:
        The table on rank 0, nothing on the others.

    Raises:
        RankInfoError: The launcher's environment is incomplete.
    """
    rank_info = rank_info_from_env(os.environ)
    set_threads(1, rank_info)
    with init_distributed(rank_info, "mpi", TIMEOUT_S):
        groups = {"mpi": dist.group.WORLD, "gloo": dist.new_group(backend="gloo")}
        timings = measure(groups, repetitions, SIZES_BYTES)
    if rank_info.rank != 0:
        return []
    return [terminal_table(f"All-to-all on {rank_info.world_size} ranks", HEADINGS, rows(timings))]


def measure(groups: dict[str, dist.ProcessGroup], repetitions: int, sizes_bytes: Sequence[int]) -> list[Timing]:
    """Measure every size on groups of the same ranks. A collective call with equal results on every rank."""
    return [_measure_size(groups, repetitions, size_bytes) for size_bytes in sizes_bytes]


def _measure_size(groups: dict[str, dist.ProcessGroup], repetitions: int, size_bytes: int) -> Timing:
    sent = torch.zeros(size_bytes, dtype=torch.uint8)
    received = torch.empty_like(sent)
    operations: dict[str, Callable[[], object]] = {"copy": lambda: received.copy_(sent)}
    for name, group in groups.items():
        operations[name] = functools.partial(dist.all_to_all_single, received, sent, group=group)
    times_s: dict[str, list[float]] = {name: [] for name in operations}
    order = list(operations)
    for repetition in range(-WARM_UP, repetitions):
        order.reverse()
        for name in order:
            dist.barrier(group=groups.get(name))
            began_s = time.perf_counter()
            for _ in range(CONSECUTIVE):
                operations[name]()
            if repetition >= 0:
                times_s[name].append((time.perf_counter() - began_s) / CONSECUTIVE)
    medians_us = torch.tensor([median(times_s[name]) * 1e6 for name in operations], dtype=torch.float64)
    dist.all_reduce(medians_us, dist.ReduceOp.MAX)
    return Timing(size_bytes, dict(zip(operations, medians_us.tolist(), strict=True)))


HEADINGS = ("bytes per rank", "gloo, us", "mpi, us", "copy, us", "gloo / mpi", "mpi / copy", "mpi, GB/s")


def rows(timings: Sequence[Timing]) -> list[list[str]]:
    """Build one row per size, with the columns of `HEADINGS`."""
    return [
        [
            f"{timing.size_bytes:,}",
            *(f"{timing.times_us[name]:,.0f}" for name in ("gloo", "mpi", "copy")),
            f"{timing.ratio('gloo', 'mpi'):.1f}",
            f"{timing.ratio('mpi', 'copy'):.1f}",
            f"{timing.bandwidth_gb_per_s('mpi'):.2f}",
        ]
        for timing in timings
    ]
