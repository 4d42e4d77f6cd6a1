"""All checks in their order, by the workers together: one that fails is told, and the others still run."""

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from enum import IntEnum
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist
from torch.distributed import distributed_c10d

from dist_moe.comm.init import init_distributed, set_pg_timeouts, set_threads
from dist_moe.comm.mesh import make_mesh, ranks_per_node
from dist_moe.comm.reduce import all_gather_objects
from dist_moe.config import Resolved
from dist_moe.data.corpus import TokenizedData
from dist_moe.doctor.context import DoctorContext
from dist_moe.doctor.estimates import check_disk, check_memory, shape_of
from dist_moe.doctor.finding import Finding, Outcome
from dist_moe.doctor.machines import check_exchange, check_rank_infos, check_speed, check_versions
from dist_moe.doctor.network import check_clocks, check_ports
from dist_moe.doctor.temporary import temporary
from dist_moe.doctor.training_checks import check_parity, check_saving
from dist_moe.errors import UserError
from dist_moe.train.setup import tokenize
from dist_moe.worker.rank_info import RankInfo

NO_TEXT = "there is no text, so nothing can be trained"
LONGEST_S = 30.0
"""A collective of a check ends after this long at most, where parallel.timeout_s is not shorter."""
MANY_EPOCHS = 4.0
"""More repetitions of a text teach a model little that is new (arXiv 2305.16264)."""
TOLD = "doctor/told"
LINGER_S = 2.0
"""How long rank 0 stays after it has told, since it may keep the store that the others look into."""
SEVEREST = (Outcome.failed, Outcome.warned, Outcome.passed, Outcome.idle)

Check = Callable[[DoctorContext], Finding]


class Part(IntEnum):
    """What a rank had in a check; of several failures the one of the least part is told."""

    made = 0
    silent = 1
    lost_others = 2


def sizes_check(name: str, look: Callable[..., Finding]) -> tuple[str, Check]:
    """A check of memory or disk, which needs the shapes of the whole model."""

    def check(subject: DoctorContext) -> Finding:
        vocabulary = subject.prepared.tokenizer.vocab_size if subject.prepared else 1 << 15
        return look(subject, shape_of(subject.resolved, vocabulary), subject.bf16)

    return name, check


def check_text(subject: DoctorContext) -> Finding:
    """How often the run reads its text; a warning where that is often."""
    assert subject.prepared is not None
    config, tokens = subject.config, len(subject.prepared.train.tokens)
    read = config.train.steps * config.train.global_batch_size * config.data.sequence_length
    epochs = read / tokens
    optimizer_fragments = len(subject.prepared.validation.tokens)
    told = f"{tokens:,} tokens to train on, {optimizer_fragments:,} held out; the run reads {read:,}, that is {epochs:.2f} epochs"
    if epochs > MANY_EPOCHS:
        remedy = f"more text, or fewer train.steps; beyond {MANY_EPOCHS:.0f} epochs a text teaches little that is new"
        return Finding("text", Outcome.warned, told, remedy)
    return Finding("text", Outcome.passed, told)


CHECKS: tuple[tuple[str, Check], ...] = (
    ("versions", check_versions),
    ("places", check_rank_infos),
    ("ports", check_ports),
    ("clocks", check_clocks),
    ("text", check_text),
    ("all-to-all", check_exchange),
    ("exchange", check_speed),
    ("EP 1 = EP N", check_parity),
    ("save and load", check_saving),
    sizes_check("memory", check_memory),
    sizes_check("disk", check_disk),
)
NEED_TEXT = ("text", "EP 1 = EP N", "save and load")


def examine(
    resolved: Resolved,
    rank_info: RankInfo,
    folder: Path,
    tell: Callable[[Sequence[Finding]], None],
    leave: Callable[[Sequence[Finding]], NoReturn],
) -> list[Finding]:
    """Make all checks as one of the workers -> the findings. folder: of the doctor alone, and gone afterwards.

    tell: rank 0's, given the findings. leave: ends this process at once, and is called after that where the workers
    have lost each other, since parting may then take for ever.
    """
    config = resolved.config
    set_threads(config.run.threads, rank_info)
    prepared: TokenizedData | None = None
    lacking = ""
    try:
        prepared = tokenize(config)
    except (UserError, OSError) as error:
        lacking = str(error)
    limit_s = min(config.parallel.timeout_s, LONGEST_S)
    with init_distributed(rank_info, config.parallel.backend, config.parallel.timeout_s) as dist_context:
        mesh = make_mesh(resolved.expert_parallel, ranks_per_node(config.parallel.all_to_all, resolved.expert_parallel))
        set_pg_timeouts(limit_s)
        subject = DoctorContext(resolved, dist_context, mesh, folder, prepared, limit_s)
        lacking = next(filter(None, all_gather_objects(lacking)), "")
        with temporary(folder):
            findings, lost = make_checks(subject, lacking)
            lost = lost or not all_are_here()
        if rank_info.rank == 0:
            tell(findings)
        if lost:
            wait_until_told(rank_info.rank, limit_s)
            leave(findings)
    return findings


def all_are_here() -> bool:
    """Whether all ranks have come so far; then nobody still reads what another one removes."""
    try:
        dist.barrier()
    except RuntimeError:
        return False
    return True


def wait_until_told(rank: int, limit_s: float) -> None:
    """Wait for rank 0 to have told what was found: whoever started the workers ends all when one has ended."""
    store = distributed_c10d._get_default_store()
    with contextlib.suppress(RuntimeError):  # the store goes with whoever keeps it
        if rank == 0:
            store.set(TOLD, "1")
            time.sleep(LINGER_S)
        else:
            store.wait([TOLD], timedelta(seconds=3 * limit_s))


def make_checks(subject: DoctorContext, lacking: str) -> tuple[list[Finding], bool]:
    """All of them -> the findings, and whether the workers have lost each other. lacking: why there is no text."""
    findings, lost = [], False
    for name, check in CHECKS:
        if lost:
            findings.append(Finding(name, Outcome.idle, "not made, since the workers have lost each other"))
        elif name in NEED_TEXT and lacking:
            failed = Finding("text", Outcome.failed, lacking, "mend data.sources")
            findings.append(failed if name == "text" else Finding(name, Outcome.idle, NO_TEXT))
        else:
            finding, lost = run_on_all_ranks(name, check, subject)
            findings.append(finding)
    return findings, lost


def run_on_all_ranks(name: str, check: Check, subject: DoctorContext) -> tuple[Finding, bool]:
    """A check by all ranks -> the severest of their findings, and whether a collective was broken off.

    What a check raises is a failure in its words. The verdicts go by the store, and not by a collective: a rank that
    has raised is not where the others are.
    """
    lost = False
    try:
        own = check(subject)
    except Exception as error:  # whatever it is, it is worth telling
        words = str(error).splitlines()[0] if str(error) else ""
        told = f"rank {subject.mesh.rank}: {type(error).__name__}: {words}"
        own = Finding(name, Outcome.failed, told, "mend what it says, and try again")
        lost = isinstance(error, RuntimeError) and not isinstance(error, UserError)
    deadline_s = time.monotonic() + 2 * subject.limit_s
    order = told_first(subject.mesh.rank, subject.mesh.world_size)
    verdicts = [_verdict(name, rank, own, lost, subject, deadline_s) for rank in order]
    # A rank that only lost the others says less than the one that they lost.
    worst = min(verdicts, key=lambda one: (SEVEREST.index(one[0].outcome), one[1]))
    return worst[0], any(part is not Part.made for _, part in verdicts)


def told_first(own: int, ranks: int) -> list[int]:
    """This rank, which tells, and then the others, which are asked."""
    return [own, *(rank for rank in range(ranks) if rank != own)]


def _verdict(
    name: str, rank: int, own: Finding, lost: bool, subject: DoctorContext, deadline_s: float
) -> tuple[Finding, Part]:
    store, key = distributed_c10d._get_default_store(), f"doctor/{name}/{rank}"
    if rank == subject.mesh.rank:
        part = Part.lost_others if lost else Part.made
        with contextlib.suppress(RuntimeError):  # without a store the others are not there either
            store.set(key, json.dumps([asdict(own), part]))
        return own, part
    try:
        # One deadline for all: many that are dead cost no more than one.
        store.wait([key], timedelta(seconds=max(0.1, deadline_s - time.monotonic())))
        finding, part = json.loads(store.get(key))
    except RuntimeError:
        silent = Finding(name, Outcome.failed, f"rank {rank} does not answer", "see to its host, and try again")
        return silent, Part.silent
    return Finding(**{**finding, "outcome": Outcome(finding["outcome"])}), Part(part)
