"""Checks of the machines: equal versions, thread counts, and the all-to-all's correctness, latency and bandwidth."""

import os
import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from transformers import AutoConfig

from dist_moe.comm.exchange import exchange_rows
from dist_moe.comm.mesh import Mesh
from dist_moe.comm.objects import all_gather_objects
from dist_moe.doctor.context import DoctorContext
from dist_moe.doctor.finding import Finding, Outcome
from dist_moe.families.registry import family_of
from dist_moe.observe.record import versions
from dist_moe.text import counted, format_bytes
from dist_moe.worker.source_digest import source_digest

SMALL_BYTES = 16 << 10
REPETITIONS = 20
WIDTH = 8


def check_versions(context: DoctorContext) -> Finding:
    """Compare Python, the libraries and the sources of this package over all ranks."""
    own = {**versions(), "dist-moe source": source_digest()[:12]}
    return compare_versions(all_gather_objects(own, dict[str, str | None]))


def compare_versions(by_rank: Sequence[Mapping[str, str | None]]) -> Finding:
    """Compare versions, and name the ranks that differ from the majority.

    Args:
        by_rank: Versions of each rank, by name.
    """
    mismatches = []
    for name in by_rank[0]:
        counts = Counter(of_rank.get(name) for of_rank in by_rank)
        (majority, _), *_ = counts.most_common(1)
        others = {rank: of_rank.get(name) for rank, of_rank in enumerate(by_rank) if of_rank.get(name) != majority}
        mismatches += [f"rank {rank} has {name} {version}, most have {majority}" for rank, version in others.items()]
    if mismatches:
        remedy = "install the same versions everywhere: pip install -c constraints.txt"
        return Finding("versions", Outcome.failed, "; ".join(mismatches), remedy)
    main = ", ".join(f"{name} {by_rank[0].get(name)}" for name in ("python", "torch", "deepspeed", "transformers"))
    return Finding("versions", Outcome.passed, f"equal on {counted(len(by_rank), 'rank')}: {main}")


def check_placement(context: DoctorContext) -> Finding:
    """Report backend, device and ranks per host, and compare threads with the cores of each host."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    backend, device = context.dist_context.backend, context.dist_context.device.type
    layout = f"backend {backend}, device {device}; expert parallel {context.mesh.expert_parallel}"
    own = (socket.gethostname(), cores, torch.get_num_threads())
    return compare_placement(all_gather_objects(own, tuple[str, int, int]), layout)


def compare_placement(by_rank: Sequence[tuple[str, int, int]], layout: str) -> Finding:
    """Compare the threads of each host's ranks with its cores.

    Args:
        by_rank: Host, cores and threads of each rank. A rank that is bound to some cores sees only those.
        layout: Text that precedes the finding.
    """
    hosts: dict[str, list[tuple[int, int]]] = {}
    for host, cores, threads in by_rank:
        hosts.setdefault(host, []).append((cores, threads))
    oversubscribed = [
        f"{host}: {counted(sum(threads for _, threads in ranks), 'thread')} of {counted(len(ranks), 'rank')} on "
        f"{counted(ranks[0][0], 'core')}"
        for host, ranks in hosts.items()
        if len({cores for cores, _ in ranks}) == 1 and sum(threads for _, threads in ranks) > ranks[0][0]
    ]
    if oversubscribed:
        remedy = "start fewer workers per host, or set run.threads"
        return Finding("placement", Outcome.warned, f"{layout}; {'; '.join(oversubscribed)}", remedy)
    ranks_per_host = ", ".join(f"{len(ranks)} on {host}" for host, ranks in hosts.items())
    text = f"{layout}; ranks: {ranks_per_host}; threads per rank: {by_rank[0][2]}"
    return Finding("placement", Outcome.passed, text)


def patterns(ranks: int) -> dict[str, list[list[int]]]:
    """Build the all-to-all patterns to test: by name, rows that rank r sends to rank p as [r][p]."""
    return {
        "even": [[3] * ranks for _ in range(ranks)],
        "uneven": [[(r * 5 + p * 3) % 7 for p in range(ranks)] for r in range(ranks)],
        "some empty": [[(r + p) % 2 * 4 for p in range(ranks)] for r in range(ranks)],
        "all to one": [[9 * (p == ranks - 1) for p in range(ranks)] for _ in range(ranks)],
        "none": [[0] * ranks for _ in range(ranks)],
    }


def check_all_to_all(context: DoctorContext) -> Finding:
    """Check that every row and its gradient arrive unchanged at the right rank."""
    name, group, mesh = "all-to-all", context.mesh.ep_group, context.mesh
    if group is None:
        return Finding(name, Outcome.not_applicable, "expert parallel 1 has no all-to-all")
    wrong = []
    for dtype in (torch.float32, torch.bfloat16):
        for pattern, rows in patterns(mesh.expert_parallel).items():
            send, receive = rows[mesh.ep_rank], [of_rank[mesh.ep_rank] for of_rank in rows]
            values = [_row_value(mesh.ep_rank, p) for p, count in enumerate(send) for _ in range(count)]
            sent = torch.tensor(values, dtype=dtype, device=context.dist_context.device).reshape(-1, 1).repeat(1, WIDTH)
            sent.requires_grad_()
            (received,) = exchange_rows([sent], send, receive, group, mesh.buffers)
            expected = [_row_value(r, mesh.ep_rank) for r, count in enumerate(receive) for _ in range(count)]
            received.sum().backward()
            gradient_ok = sent.grad is not None and bool((sent.grad == 1).all())
            rows_ok = received[:, 0].tolist() == expected and bool((received == received[:, :1]).all())
            if not (rows_ok and gradient_ok):
                wrong.append(f"{pattern} in {str(dtype).removeprefix('torch.')}")
    if wrong:
        remedy = "try parallel.all_to_all=flat and another parallel.backend, and report the problem"
        return Finding(name, Outcome.failed, f"rank {mesh.rank}: wrong rows: {', '.join(wrong)}", remedy)
    text = f"{', '.join(patterns(2))}: all rows and gradients correct, in fp32 and bf16, {_path(mesh)}"
    return Finding(name, Outcome.passed, text)


def _path(mesh: Mesh) -> str:
    """Return how the rows of the check travel, in words."""
    return f"over {dist.get_backend(mesh.ep_group)}" if mesh.buffers is None else "through shared memory"


def _row_value(source: int, target: int) -> float:
    """Return a number for the rows from one rank to another; bf16 holds integers exactly only up to 256."""
    return float((source * 31 + target * 7) % 251)


def check_bandwidth(context: DoctorContext) -> Finding:
    """Measure latency and bandwidth of the all-to-all, and estimate the time that a step spends in it."""
    name, mesh = "bandwidth", context.mesh
    if mesh.ep_group is None:
        return Finding(name, Outcome.not_applicable, "expert parallel 1 has no all-to-all")
    small_s, message_s = (_all_to_all_s(context, size) for size in (SMALL_BYTES, context.message_bytes))
    block = torch.ones(context.message_bytes, dtype=torch.uint8)
    copy_s = _median_s(lambda: block.clone())
    layers = moe_layer_count(context)
    # Dispatch and combine, each forward and backward.
    step_s = 4 * layers * context.resolved.accumulation * message_s
    limit_s = context.config.parallel.timeout_s
    text = (
        f"{_path(mesh)}, {format_bytes(SMALL_BYTES)} in {1e6 * small_s:.0f} us; the "
        f"{format_bytes(context.message_bytes)} of a micro-batch in {1e3 * message_s:.2f} ms "
        f"({context.message_bytes / message_s / 1e6:,.0f} MB/s; a copy in memory "
        f"{context.message_bytes / copy_s / 1e6:,.0f} MB/s); with {counted(layers, 'MoE layer')} "
        f"{1e3 * step_s:,.0f} ms per step"
    )
    if message_s * 100 > limit_s:
        remedy = f"raise parallel.timeout_s={limit_s:g} to at least {100 * message_s:.0f}"
        return Finding(name, Outcome.warned, text, remedy)
    return Finding(name, Outcome.passed, text)


def moe_layer_count(context: DoctorContext) -> int:
    """Count the MoE layers of the run's model."""
    architecture = context.config.model.architecture
    return len(family_of(architecture).moe_layers(AutoConfig.for_model(architecture, **context.resolved.model_config)))


def _all_to_all_s(context: DoctorContext, size_bytes: int) -> float:
    """Return the median seconds of an all-to-all in which each rank sends about `size_bytes` in equal parts."""
    mesh, group = context.mesh, context.mesh.ep_group
    assert group is not None
    part = max(1, size_bytes // mesh.expert_parallel)
    sent = torch.zeros(part * mesh.expert_parallel, dtype=torch.uint8, device=context.dist_context.device)
    counts = [part] * mesh.expert_parallel

    def exchange() -> None:
        exchange_rows([sent], counts, counts, group, mesh.buffers)
        if sent.is_cuda:
            torch.cuda.synchronize()

    return _median_s(exchange)


def _median_s(work: Callable[[], object]) -> float:
    times_s = []
    for _ in range(REPETITIONS):
        began_s = time.perf_counter()
        work()
        times_s.append(time.perf_counter() - began_s)
    return max(statistics.median(times_s), 1e-7)
