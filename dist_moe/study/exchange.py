"""The speed of the all-to-all: MPI's backend beside gloo's and a mere copy, in turns in one job of mpirun.

Every rank sends an equal part to every rank. One repetition is ten all-to-alls in a row of each backend, whoever comes
first alternating, so that what else the host does falls on both alike. (The time of a single one would be mostly what
one rank leaves the barrier earlier than another.)
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
from dist_moe.study.table import fitted_table
from dist_moe.worker.rank_info import rank_info_from_env

SIZES_BYTES = (1 << 10, 1 << 14, 1 << 18, 1 << 22, 1 << 24)
"""Of what one rank sends in all."""
WARM_UP = 3
IN_A_ROW = 10
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Timing:
    """The median of one all-to-all, on the slowest rank.

    size_bytes: what one rank sends in all, its part to itself included. times_us: by the name of the backend; "copy" is
    of as many bytes within each rank, at the same time, below which no exchange in the memory of one host can fall.
    """

    size_bytes: int
    times_us: dict[str, float]

    def ratio(self, slower: str, faster: str) -> float:
        """How many times longer the first takes."""
        return self.times_us[slower] / self.times_us[faster]

    def bandwidth_gb_per_s(self, backend: str) -> float:
        """Of what one rank sends, 10^9 bytes a second."""
        return self.size_bytes / self.times_us[backend] / 1e3


def run(repetitions: int) -> list[Table]:
    """Join the job that mpirun started, and measure -> the table on rank 0, none elsewhere. Errors: PlaceError."""
    rank_info = rank_info_from_env(os.environ)
    set_threads(1, rank_info)
    with init_distributed(rank_info, "mpi", TIMEOUT_S):
        groups = {"mpi": dist.group.WORLD, "gloo": dist.new_group(backend="gloo")}
        timings = measure(groups, repetitions, SIZES_BYTES)
    if rank_info.rank != 0:
        return []
    return [fitted_table(f"All-to-all on {rank_info.world_size} ranks", HEADINGS, rows(timings))]


def measure(groups: dict[str, dist.ProcessGroup], repetitions: int, sizes_bytes: Sequence[int]) -> list[Timing]:
    """Time every size on groups of the same ranks; the same on every rank. Errors: those of torch.distributed."""
    return [_measure_size(groups, repetitions, size_bytes) for size_bytes in sizes_bytes]


def _measure_size(groups: dict[str, dist.ProcessGroup], repetitions: int, size_bytes: int) -> Timing:
    sent = torch.zeros(size_bytes, dtype=torch.uint8)
    received = torch.empty_like(sent)
    moves: dict[str, Callable[[], object]] = {"copy": lambda: received.copy_(sent)}
    for name, group in groups.items():
        moves[name] = functools.partial(dist.all_to_all_single, received, sent, group=group)
    taken_s: dict[str, list[float]] = {name: [] for name in moves}
    order = list(moves)
    for repetition in range(-WARM_UP, repetitions):
        order.reverse()
        for name in order:
            dist.barrier(group=groups.get(name))
            began_s = time.perf_counter()
            for _ in range(IN_A_ROW):
                moves[name]()
            if repetition >= 0:
                taken_s[name].append((time.perf_counter() - began_s) / IN_A_ROW)
    medians_us = torch.tensor([median(taken_s[name]) * 1e6 for name in moves], dtype=torch.float64)
    dist.all_reduce(medians_us, dist.ReduceOp.MAX)
    return Timing(size_bytes, dict(zip(moves, medians_us.tolist(), strict=True)))


HEADINGS = ("bytes a rank", "gloo, us", "mpi, us", "copy, us", "gloo / mpi", "mpi / copy", "mpi, GB/s")


def rows(timings: Sequence[Timing]) -> list[list[str]]:
    """One row for each size, as `HEADINGS` says."""
    return [
        [
            f"{one.size_bytes:,}",
            *(f"{one.times_us[name]:,.0f}" for name in ("gloo", "mpi", "copy")),
            f"{one.ratio('gloo', 'mpi'):.1f}",
            f"{one.ratio('mpi', 'copy'):.1f}",
            f"{one.bandwidth_gb_per_s('mpi'):.2f}",
        ]
        for one in timings
    ]
