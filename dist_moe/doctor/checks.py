"""All checks in order, run by all workers together; a failed check does not stop the others."""

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from enum import IntEnum
from pathlib import Path
from typing import NoReturn, TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d

from dist_moe.comm.init import init_distributed, set_pg_timeouts, set_threads
from dist_moe.comm.objects import all_gather_objects
from dist_moe.config import Resolved
from dist_moe.data.labeled.prepare import LabeledData
from dist_moe.deadline import call_within
from dist_moe.doctor.context import DoctorContext
from dist_moe.doctor.estimates import ModelShape, check_disk, check_memory, model_shape
from dist_moe.doctor.finding import Finding, Outcome, finding_from_dict
from dist_moe.doctor.machines import check_all_to_all, check_bandwidth, check_placement, check_versions
from dist_moe.doctor.network import check_clocks, check_ports
from dist_moe.doctor.temporary import temporary_folder
from dist_moe.doctor.training_checks import check_parity, check_saving
from dist_moe.engine.train_state import RunData
from dist_moe.errors import UserError
from dist_moe.train.setup import build_mesh, tokenize
from dist_moe.worker.cpu import keep_freed_memory
from dist_moe.worker.rank_info import RankInfo

NO_TEXT = "not run, since there is no text to train on"
GROUP_BROKEN = "not run, since the process group broke in an earlier check"
MAX_COLLECTIVE_S = 30.0
"""Timeout of a check's collectives, unless parallel.timeout_s is shorter."""
MAX_EPOCHS = 4.0
"""Beyond this, repeating a text improves a model little (Muennighoff et al. 2023, arXiv 2305.16264)."""
REPORTED_KEY = "doctor/reported"
LINGER_S = 2.0
"""How long rank 0 stays after its report: it may host the store that the other ranks wait on."""
BY_SEVERITY = (Outcome.failed, Outcome.warned, Outcome.passed, Outcome.not_applicable)

STORE_LIMIT_S = 5.0
"""How much longer than its own limit an operation of the store may take."""

Result = TypeVar("Result")
Check = Callable[[DoctorContext], Finding]


class Role(IntEnum):
    """A rank's part in a check. Of several failures, the one with the lowest role is reported: it is the cause."""

    completed = 0
    no_answer = 1
    lost_peers = 2


def model_shape_check(name: str, check: Callable[[DoctorContext, ModelShape, bool], Finding]) -> tuple[str, Check]:
    """Adapt a check of memory or disk, which needs the shape of the whole model."""

    def adapted(context: DoctorContext) -> Finding:
        vocabulary = context.tokenized.tokenizer.vocab_size if context.tokenized else 1 << 15
        return check(context, model_shape(context.resolved, vocabulary), context.bf16)

    return name, adapted


def check_text(context: DoctorContext) -> Finding:
    """Report how many epochs the run reads, and warn above MAX_EPOCHS."""
    assert context.tokenized is not None
    config, data = context.config, context.tokenized
    read = config.train.steps * config.train.global_batch_size
    if isinstance(data, LabeledData):
        what, units, held_out = "examples", data.train.count, data.validation.count
    else:
        what, units, held_out = "tokens", len(data.train.tokens), len(data.validation.tokens)
        read *= config.data.sequence_length
    epochs = read / units
    text = f"{units:,} training {what}, {held_out:,} held out; the run reads {read:,} {what}, {epochs:.2f} epochs"
    if epochs > MAX_EPOCHS:
        remedy = f"use more text, or fewer train.steps; beyond {MAX_EPOCHS:.0f} epochs a model learns little more"
        return Finding("text", Outcome.warned, text, remedy)
    return Finding("text", Outcome.passed, text)


CHECKS: tuple[tuple[str, Check], ...] = (
    ("versions", check_versions),
    ("placement", check_placement),
    ("ports", check_ports),
    ("clocks", check_clocks),
    ("text", check_text),
    ("all-to-all", check_all_to_all),
    ("bandwidth", check_bandwidth),
    ("EP 1 = EP N", check_parity),
    ("save and load", check_saving),
    model_shape_check("memory", check_memory),
    model_shape_check("disk", check_disk),
)
NEED_TEXT = ("text", "EP 1 = EP N", "save and load")


def run_checks(
    resolved: Resolved,
    rank_info: RankInfo,
    folder: Path,
    report: Callable[[Sequence[Finding]], None],
    abort: Callable[[Sequence[Finding]], NoReturn],
) -> list[Finding]:
    """Run all checks as one of the workers.

    Args:
        resolved: The configuration, resolved for the number of workers.
        rank_info: This worker's rank.
        folder: A folder for temporary files, removed afterwards.
        report: Called on rank 0 with the findings.
        abort: Ends this process at once; called after the report if the process group broke, since shutting it down
            could then block forever.

    Returns:
        The findings, equal on every rank that completed the checks.
    """
    config = resolved.config
    set_threads(config.run.threads, rank_info)
    tokenized: RunData | None = None
    text_error = ""
    try:
        tokenized = tokenize(config)
    except (UserError, OSError) as error:
        text_error = str(error)
    limit_s = min(config.parallel.timeout_s, MAX_COLLECTIVE_S)
    with init_distributed(rank_info, config.parallel.backend, config.parallel.timeout_s) as dist_context:
        if config.run.keep_memory and dist_context.device.type == "cpu":
            keep_freed_memory()  # as in the run, whose times are measured
        mesh = build_mesh(resolved)
        set_pg_timeouts(limit_s)
        context = DoctorContext(resolved, dist_context, mesh, folder, tokenized, limit_s)
        text_error = next(filter(None, all_gather_objects(text_error, str)), "")
        with temporary_folder(folder):
            findings, group_broken = _run_in_order(context, text_error)
            # No rank may remove files that another one still reads.
            group_broken = group_broken or not _all_ranks_arrived()
        if rank_info.rank == 0:
            report(findings)
        if group_broken:
            _wait_for_report(rank_info.rank, limit_s)
            abort(findings)
    return findings


def _all_ranks_arrived() -> bool:
    try:
        dist.barrier()
    except RuntimeError:
        return False
    return True


def _wait_for_report(rank: int, limit_s: float) -> None:
    """Wait until rank 0 has reported: a launcher ends all workers as soon as one of them exits."""
    store = distributed_c10d._get_default_store()
    with contextlib.suppress(RuntimeError):  # the store is gone if the rank that hosts it is
        if rank == 0:
            store.set(REPORTED_KEY, "1")
            time.sleep(LINGER_S)
        else:
            waited = timedelta(seconds=3 * limit_s)
            _from_store(lambda: store.check([REPORTED_KEY]), STORE_LIMIT_S)  # ends the wait early if rank 0 is stopped
            _from_store(lambda: store.wait([REPORTED_KEY], waited), 3 * limit_s + STORE_LIMIT_S)


def _run_in_order(context: DoctorContext, text_error: str) -> tuple[list[Finding], bool]:
    """Run all checks.

    Args:
        context: Input of the checks.
        text_error: Why no text is available; empty if it is.

    Returns:
        The findings, and whether the process group broke.
    """
    findings, group_broken = [], False
    for name, check in CHECKS:
        if group_broken:
            findings.append(Finding(name, Outcome.not_applicable, GROUP_BROKEN))
        elif name in NEED_TEXT and text_error:
            failed = Finding("text", Outcome.failed, text_error, "fix data.sources")
            findings.append(failed if name == "text" else Finding(name, Outcome.not_applicable, NO_TEXT))
        else:
            finding, group_broken = run_on_all_ranks(name, check, context)
            findings.append(finding)
    return findings, group_broken


def run_on_all_ranks(name: str, check: Check, context: DoctorContext) -> tuple[Finding, bool]:
    """Run one check on all ranks, and agree on its most severe finding.

    An exception is a failure of the check. The ranks exchange their findings through the store rather than by a
    collective: a rank that has raised is not at the same collective as the others.

    Returns:
        The most severe finding, and whether the process group broke.
    """
    lost_peers = False
    try:
        own = check(context)
    except Exception as error:  # any exception is a finding
        message = str(error).splitlines()[0] if str(error) else ""
        text = f"rank {context.mesh.rank}: {type(error).__name__}: {message}"
        own = Finding(name, Outcome.failed, text, "fix the cause, and run the doctor again")
        lost_peers = isinstance(error, RuntimeError) and not isinstance(error, UserError)
    _publish(name, context.mesh.rank, own, Role.lost_peers if lost_peers else Role.completed)
    # One deadline for all ranks, so that many dead ranks take no longer than one.
    deadline_s = time.monotonic() + 2 * context.limit_s
    results = [(own, Role.lost_peers if lost_peers else Role.completed)]
    results += [
        _result_of(name, rank, deadline_s) for rank in range(context.mesh.world_size) if rank != context.mesh.rank
    ]
    finding, _ = min(results, key=lambda result: (BY_SEVERITY.index(result[0].outcome), result[1]))
    return finding, any(role is not Role.completed for _, role in results)


def _publish(name: str, rank: int, finding: Finding, role: Role) -> None:
    content = json.dumps([asdict(finding), role])
    with contextlib.suppress(RuntimeError):  # without a store there are no ranks left that could read it
        store = distributed_c10d._get_default_store()
        _from_store(lambda: store.set(f"doctor/{name}/{rank}", content), STORE_LIMIT_S)


def _from_store(work: Callable[[], Result], limit_s: float) -> Result:
    """Return what an operation of the store returns; if rank 0 is stopped, it has no end.

    Raises:
        RuntimeError: The store does not answer in time, or what it raises.
    """
    try:
        return call_within(work, limit_s, "the store did not answer")
    except TimeoutError as error:
        raise RuntimeError(str(error)) from None


def _result_of(name: str, rank: int, deadline_s: float) -> tuple[Finding, Role]:
    """Read another rank's finding from the store, waiting until the deadline (time.monotonic)."""
    store, key = distributed_c10d._get_default_store(), f"doctor/{name}/{rank}"
    limit_s = max(0.1, deadline_s - time.monotonic())

    def read() -> bytes:
        store.wait([key], timedelta(seconds=limit_s))
        content: bytes = store.get(key)
        return content

    try:
        finding, role = json.loads(_from_store(read, limit_s + STORE_LIMIT_S))
    except RuntimeError:
        silent = Finding(
            name, Outcome.failed, f"rank {rank} does not answer", "check its host, and run the doctor again"
        )
        return silent, Role.no_answer
    return finding_from_dict(finding), Role(role)
