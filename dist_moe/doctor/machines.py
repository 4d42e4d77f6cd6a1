"""Checks of the machines: equal versions, threads, the exchange's values, its latency and bandwidth."""

import os
import socket
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from dist_moe.comm.exchange import exchange_rows
from dist_moe.comm.reduce import all_gather_objects
from dist_moe.doctor.context import DoctorContext
from dist_moe.doctor.finding import Finding, Outcome, bytes_in_words
from dist_moe.families.registry import family_of
from dist_moe.observe.record import versions
from dist_moe.worker.source_digest import source_digest

SMALL_BYTES = 16 << 10
REPETITIONS = 20
WIDTH = 8


def check_versions(subject: DoctorContext) -> Finding:
    """Every rank has the same Python, libraries and sources."""
    own = {**versions(), "dist-moe source": source_digest()[:12]}
    return compare_versions(all_gather_objects(own))


def compare_versions(found: Sequence[Mapping[str, str | None]]) -> Finding:
    """found: names and versions of each rank. Ranks that differ from most are named."""
    wrong = []
    for name in found[0]:
        counts = Counter(one.get(name) for one in found)
        (most, _), *_ = counts.most_common(1)
        others = {rank: one.get(name) for rank, one in enumerate(found) if one.get(name) != most}
        wrong += [f"rank {rank} has {name} {version}, most have {most}" for rank, version in others.items()]
    if wrong:
        remedy = "install the same versions everywhere: pip install -c constraints.txt"
        return Finding("versions", Outcome.failed, "; ".join(wrong), remedy)
    named = ", ".join(f"{name} {found[0].get(name)}" for name in ("python", "torch", "deepspeed", "transformers"))
    return Finding("versions", Outcome.passed, f"equal on {len(found)} ranks: {named}")


def check_rank_infos(subject: DoctorContext) -> Finding:
    """Backend, device, and threads against the cores of each host."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    told = f"backend {subject.dist_context.backend}, device {subject.dist_context.device.type}; "
    found = all_gather_objects((socket.gethostname(), cores, torch.get_num_threads()))
    return compare_rank_infos(found, told + f"expert parallel {subject.mesh.expert_parallel}")


def compare_rank_infos(found: Sequence[tuple[str, int, int]], told: str) -> Finding:
    """found: host, cores and threads of each rank; a rank that is bound sees its own cores alone."""
    hosts: dict[str, list[tuple[int, int]]] = {}
    for host, cores, threads in found:
        hosts.setdefault(host, []).append((cores, threads))
    crowded = [
        f"{host}: {sum(threads for _, threads in ranks)} threads of {len(ranks)} ranks on {ranks[0][0]} cores"
        for host, ranks in hosts.items()
        if len({cores for cores, _ in ranks}) == 1 and sum(threads for _, threads in ranks) > ranks[0][0]
    ]
    layout = ", ".join(f"{len(ranks)} on {host}" for host, ranks in hosts.items())
    if crowded:
        remedy = "start fewer workers on a host, or set run.threads"
        return Finding("places", Outcome.warned, f"{told}; {'; '.join(crowded)}", remedy)
    return Finding("places", Outcome.passed, f"{told}; ranks: {layout}; threads of a rank: {found[0][2]}")


def patterns(ranks: int) -> dict[str, list[list[int]]]:
    """Rows that rank r sends to rank p, [r][p], by name."""
    return {
        "even": [[3] * ranks for _ in range(ranks)],
        "uneven": [[(r * 5 + p * 3) % 7 for p in range(ranks)] for r in range(ranks)],
        "some empty": [[(r + p) % 2 * 4 for p in range(ranks)] for r in range(ranks)],
        "all to one": [[9 * (p == ranks - 1) for p in range(ranks)] for _ in range(ranks)],
        "none": [[0] * ranks for _ in range(ranks)],
    }


def check_exchange(subject: DoctorContext) -> Finding:
    """Every row of an all-to-all arrives, with its value, at the rank that it was sent to, forward and backward."""
    name, group, mesh = "all-to-all", subject.mesh.ep_group, subject.mesh
    if group is None:
        return Finding(name, Outcome.idle, "expert parallel 1 exchanges nothing")
    wrong = []
    for dtype in (torch.float32, torch.bfloat16):
        for pattern, rows in patterns(mesh.expert_parallel).items():
            send, receive = rows[mesh.ep_rank], [of_rank[mesh.ep_rank] for of_rank in rows]
            values = [_mark(mesh.ep_rank, p) for p, count in enumerate(send) for _ in range(count)]
            sent = torch.tensor(values, dtype=dtype, device=subject.dist_context.device).reshape(-1, 1).repeat(1, WIDTH)
            sent.requires_grad_()
            came = exchange_rows(sent, send, receive, group)
            wanted = [_mark(r, mesh.ep_rank) for r, count in enumerate(receive) for _ in range(count)]
            came.sum().backward()
            whole = sent.grad is not None and bool((sent.grad == 1).all())
            if came[:, 0].tolist() != wanted or not bool((came == came[:, :1]).all()) or not whole:
                wrong.append(f"{pattern} in {str(dtype).removeprefix('torch.')}")
    if wrong:
        remedy = "try parallel.all_to_all=flat and another parallel.backend, and report it"
        return Finding(name, Outcome.failed, f"rank {mesh.rank}: wrong rows: {', '.join(wrong)}", remedy)
    return Finding(name, Outcome.passed, f"{', '.join(patterns(2))}: all rows right, in fp32 and bf16, and back")


def _mark(source: int, target: int) -> float:
    """A number for a row from one rank to another that bf16 holds exactly, which it does up to 256."""
    return float((source * 31 + target * 7) % 251)


def check_speed(subject: DoctorContext) -> Finding:
    """Latency and bandwidth of the exchange, and what a step's exchanges cost at least."""
    name, mesh = "exchange", subject.mesh
    if mesh.ep_group is None:
        return Finding(name, Outcome.idle, "expert parallel 1 exchanges nothing")
    small_s, own_s = (_all_to_all_s(subject, size) for size in (SMALL_BYTES, subject.message_bytes))
    copy = torch.ones(subject.message_bytes, dtype=torch.uint8)
    copy_s = _median_s(lambda: copy.clone())
    layers = moe_layer_count(subject)
    # Out and back, forward and backward.
    step_s = 4 * layers * subject.resolved.accumulation * own_s
    limit_s = subject.config.parallel.timeout_s
    told = (
        f"16 kB in {1e6 * small_s:.0f} us; {bytes_in_words(subject.message_bytes)}, as of a micro-batch, in "
        f"{1e3 * own_s:.2f} ms ({subject.message_bytes / own_s / 1e6:,.0f} MB/s, a copy in memory "
        f"{subject.message_bytes / copy_s / 1e6:,.0f}); {layers} layers, so {1e3 * step_s:,.0f} ms of a step"
    )
    if own_s * 100 > limit_s:
        remedy = f"raise parallel.timeout_s={limit_s:g} to at least {100 * own_s:.0f}"
        return Finding(name, Outcome.warned, told, remedy)
    return Finding(name, Outcome.passed, told)


def moe_layer_count(subject: DoctorContext) -> int:
    """From the keys of the model's config, as the family reads them."""
    from transformers import AutoConfig

    architecture = subject.config.model.architecture
    return len(family_of(architecture).moe_layers(AutoConfig.for_model(architecture, **subject.resolved.model_config)))


def _all_to_all_s(subject: DoctorContext, size: int) -> float:
    each = max(1, size // subject.mesh.expert_parallel)
    block = torch.zeros(each * subject.mesh.expert_parallel, dtype=torch.uint8, device=subject.dist_context.device)
    came = torch.empty_like(block)

    def once() -> None:
        dist.all_to_all_single(came, block, group=subject.mesh.ep_group)
        if block.is_cuda:
            torch.cuda.synchronize()

    return _median_s(once)


def _median_s(work: object) -> float:
    times = []
    for _ in range(REPETITIONS):
        began_s = time.perf_counter()
        work()  # type: ignore[operator]
        times.append(time.perf_counter() - began_s)
    return max(statistics.median(times), 1e-7)
