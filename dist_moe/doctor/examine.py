"""All checks in their order, by the workers together: one that fails is told, and the others still run."""

import json
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed import distributed_c10d

from dist_moe.comm.bootstrap import join_world, limit_groups, set_threads
from dist_moe.comm.mesh import make_mesh, ranks_per_node
from dist_moe.comm.place import Place
from dist_moe.config import Resolved
from dist_moe.config.errors import UserError
from dist_moe.data.corpus import Prepared
from dist_moe.doctor.finding import Finding, Outcome
from dist_moe.doctor.machines import check_exchange, check_places, check_speed, check_versions
from dist_moe.doctor.sizes import check_disk, check_memory, shape_of
from dist_moe.doctor.subject import Subject
from dist_moe.doctor.trials import check_parity, check_saving
from dist_moe.train.loop import prepare_text

NO_TEXT = "there is no text, so nothing can be trained"
LONGEST_S = 30.0
"""A check that leaves ranks waiting ends after this long, whatever the run's own limit is."""
SEVEREST = (Outcome.failed, Outcome.warned, Outcome.passed, Outcome.idle)

Check = Callable[[Subject], Finding]


def sizes_check(name: str, look: Callable[..., Finding]) -> tuple[str, Check]:
    """A check of memory or disk, which needs the shapes of the whole model."""

    def check(subject: Subject) -> Finding:
        vocabulary = subject.prepared.tokenizer.vocab_size if subject.prepared else 1 << 15
        return look(subject, shape_of(subject.resolved, vocabulary), subject.bf16)

    return name, check


def check_text(subject: Subject) -> Finding:
    """How often the run reads its text."""
    assert subject.prepared is not None
    config, tokens = subject.config, len(subject.prepared.train.tokens)
    read = config.train.steps * config.train.global_batch * config.data.sequence_length
    held = len(subject.prepared.validation.tokens)
    told = (
        f"{tokens:,} tokens to train on, {held:,} held out; the run reads {read:,}, that is {read / tokens:.2f} epochs"
    )
    return Finding("text", Outcome.passed, told)


CHECKS: tuple[tuple[str, Check], ...] = (
    ("versions", check_versions),
    ("places", check_places),
    ("text", check_text),
    ("all-to-all", check_exchange),
    ("exchange", check_speed),
    ("EP 1 = EP N", check_parity),
    ("save and load", check_saving),
    sizes_check("memory", check_memory),
    sizes_check("disk", check_disk),
)
NEED_TEXT = ("text", "EP 1 = EP N", "save and load")


def examine(resolved: Resolved, place: Place, folder: Path) -> list[Finding]:
    """Make all checks as one of the workers -> the findings, the same on all. folder: of the doctor alone."""
    config = resolved.config
    set_threads(config.run.threads, place)
    prepared: Prepared | None = None
    lacking = ""
    try:
        prepared = prepare_text(config)
    except (UserError, OSError) as error:
        lacking = str(error)
    findings: list[Finding] = []
    limit_s = min(config.parallel.timeout_s, LONGEST_S)
    with join_world(place, config.parallel.backend, config.parallel.timeout_s) as world:
        mesh = make_mesh(resolved.expert_parallel, ranks_per_node(config.parallel.exchange, resolved.expert_parallel))
        limit_groups(limit_s)
        folder.mkdir(parents=True, exist_ok=True)
        subject = Subject(resolved, world, mesh, folder, prepared, limit_s)
        lacking = next(filter(None, agreed(lacking)), "")
        lost = False
        for name, check in CHECKS:
            if lost:
                findings.append(Finding(name, Outcome.idle, "not made, since the workers have lost each other"))
            elif name in NEED_TEXT and lacking:
                failed = Finding("text", Outcome.failed, lacking, "mend data.sources")
                findings.append(failed if name == "text" else Finding(name, Outcome.idle, NO_TEXT))
            else:
                finding, lost = together(name, check, subject)
                findings.append(finding)
    return findings


def agreed(word: str) -> list[str]:
    """What each rank says."""
    words = [word] * dist.get_world_size()
    if dist.get_world_size() > 1:
        dist.all_gather_object(words, word)
    return words


def together(name: str, check: Check, subject: Subject) -> tuple[Finding, bool]:
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
    verdicts = [
        _verdict(name, rank, own, lost, subject) for rank in told_first(subject.mesh.rank, subject.mesh.world_size)
    ]
    # A rank that only lost the others says less than the one that they lost.
    worst = min(verdicts, key=lambda one: (SEVEREST.index(one[0].outcome), one[1]))
    return worst[0], any(broken for _, broken in verdicts)


def told_first(own: int, ranks: int) -> list[int]:
    """This rank, which tells, and then the others, which are asked."""
    return [own, *(rank for rank in range(ranks) if rank != own)]


def _verdict(name: str, rank: int, own: Finding, lost: bool, subject: Subject) -> tuple[Finding, bool]:
    store, key = distributed_c10d._get_default_store(), f"doctor/{name}/{rank}"
    if rank == subject.mesh.rank:
        store.set(key, json.dumps([asdict(own), lost]))
        return own, lost
    try:
        store.wait([key], timedelta(seconds=2 * subject.limit_s))
    except RuntimeError:
        return Finding(name, Outcome.failed, f"rank {rank} does not answer", "see its errors, and try again"), True
    finding, broken = json.loads(store.get(key))
    return Finding(**{**finding, "outcome": Outcome(finding["outcome"])}), bool(broken)
