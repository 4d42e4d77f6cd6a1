"""The cores that a worker is bound to, and the memory that it keeps."""

import ctypes
import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from dist_moe.worker.cpu import bound_to_cores, cores_of_worker, keep_freed_memory, sort_cores
from dist_moe.worker.rank_info import RankInfo

ALLOCATIONS, ALLOCATED = 20, 64 << 20
ALLOCATE_AND_FREE = f"""
import resource, sys
from dist_moe.worker.cpu import keep_freed_memory
print(sys.argv[1] == "keep" and keep_freed_memory())
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({ALLOCATIONS}):
    bytes({ALLOCATED}).replace(b"\\0", b"1")
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def write_topology(folder: Path, cores: dict[int, tuple[int, int]]) -> Path:
    """Write socket and physical core of each logical core as the kernel does."""
    for number, (socket, core) in cores.items():
        topology = folder / f"cpu{number}" / "topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text(f"{socket}\n")
        (topology / "core_id").write_text(f"{core}\n")
    return folder


def test_hyperthreads_of_a_core_and_cores_of_a_socket_are_neighbors(tmp_path: Path) -> None:
    # Two sockets of two cores of two hyperthreads, numbered as on most servers.
    places = {number: (number % 2, number // 2 % 2) for number in range(8)}
    assert sort_cores(range(8), write_topology(tmp_path, places)) == [0, 4, 2, 6, 1, 5, 3, 7]


def test_cores_without_topology_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    assert sort_cores({3, 1, 2}, tmp_path) == [1, 2, 3]


@pytest.mark.parametrize(
    ("workers", "shares"),
    [(1, [{4, 5, 6, 7, 8}]), (2, [{4, 5}, {6, 7, 8}]), (3, [{4}, {5, 6}, {7, 8}]), (5, [{4}, {5}, {6}, {7}, {8}])],
)
def test_trap_T73_the_shares_of_workers_are_disjoint_and_cover_all_cores(workers: int, shares: list[set[int]]) -> None:
    assert [cores_of_worker([4, 5, 6, 7, 8], worker, workers) for worker in range(workers)] == shares


@pytest.mark.parametrize(
    ("workers", "threads", "share"),
    [
        (2, 1, {2, 3}),
        (2, 2, {2, 3}),
        (4, 1, {1}),
        (1, 1, None),
        (2, 3, None),  # the cores are fewer than the threads of both workers: bound already, or too few
        (5, 1, None),
    ],
)
def test_a_worker_is_bound_to_its_share_and_unbound_at_the_end(
    monkeypatch: pytest.MonkeyPatch, workers: int, threads: int, share: set[int] | None
) -> None:
    bound: list[set[int]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: bound.append(set(cores)))
    monkeypatch.setattr("dist_moe.worker.cpu.sort_cores", sorted)
    with bound_to_cores(RankInfo(1, workers, min(1, workers - 1), workers, "env"), threads) as cores:
        assert cores == (share or {0, 1, 2, 3})
    assert bound == ([share, {0, 1, 2, 3}] if share else [])


@pytest.mark.parametrize(
    ("others", "bound"), [([{0, 1, 2, 3}] * 2, True), ([{0, 1, 2, 3}, {4, 5}], False), ([{0, 1, 2, 3}, {2, 3}], False)]
)
def test_trap_T73_a_worker_that_the_launcher_has_bound_keeps_its_cores(
    monkeypatch: pytest.MonkeyPatch, others: list[set[int]], bound: bool
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: None)
    monkeypatch.setattr("dist_moe.worker.cpu.sort_cores", sorted)
    with bound_to_cores(RankInfo(0, 2, 0, 2, "slurm"), 2, others) as cores:
        assert cores == ({0, 1} if bound else {0, 1, 2, 3})


def refuse_to_bind(monkeypatch: pytest.MonkeyPatch, allowed_calls: int) -> None:
    """Make the kernel refuse to bind this thread to cores after some calls."""
    calls: list[set[int]] = []

    def bind(_: int, cores: set[int]) -> None:
        calls.append(cores)
        if len(calls) > allowed_calls:
            raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(os, "sched_setaffinity", bind)
    monkeypatch.setattr("dist_moe.worker.cpu.sort_cores", sorted)


@pytest.mark.parametrize(
    ("allowed_calls", "share", "named"), [(0, {0, 1, 2, 3}, "0 and 1"), (1, {0, 1}, "0, 1, 2 and 3")]
)
def test_a_kernel_that_refuses_to_bind_does_not_end_the_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, allowed_calls: int, share: set[int], named: str
) -> None:
    refuse_to_bind(monkeypatch, allowed_calls)
    with bound_to_cores(RankInfo(0, 2, 0, 2, "env"), 1) as cores:
        assert cores == share
    message = f"not bound to cores {named} (run.bind_cores): [Errno 1] Operation not permitted"
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [message]


def test_a_process_is_bound_only_in_the_context() -> None:
    before = os.sched_getaffinity(0)
    if len(before) < 2:
        pytest.skip("one core cannot be shared")
    with bound_to_cores(RankInfo(0, len(before), 0, len(before), "env"), 1) as cores:
        assert os.sched_getaffinity(0) == cores and len(cores) == 1
    assert os.sched_getaffinity(0) == before


def page_faults(mode: str) -> tuple[bool, int]:
    """Allocate, fill and free memory again and again; return whether it is kept, and the number of page faults."""
    argv = [sys.executable, "-c", ALLOCATE_AND_FREE, mode]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    kept, count = done.stdout.split()
    return kept == "True", int(count)


@pytest.mark.slow
def test_trap_T73_memory_that_is_kept_causes_no_page_faults() -> None:
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("not glibc")
    pages = ALLOCATED // resource.getpagesize()
    assert page_faults("leave")[1] > (ALLOCATIONS - 2) * pages
    kept, count = page_faults("keep")
    assert kept and count < 4 * pages


def test_an_older_glibc_is_given_the_largest_size_that_it_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []

    class OldGlibc:
        def mallopt(self, parameter: int, value: int) -> int:
            calls.append((parameter, value))
            return int(value <= 32 << 20)

    monkeypatch.setattr(ctypes, "CDLL", lambda _: OldGlibc())
    assert keep_freed_memory()
    assert calls == [(-3, 128 << 20), (-3, 32 << 20), (-1, -1)]


def test_another_c_library_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert not keep_freed_memory()
