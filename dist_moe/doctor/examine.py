"""All checks in their order, by the workers together: one that fails is told, and the others still run."""

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from dist_moe.comm.bootstrap import join_world, limit_groups, set_threads
from dist_moe.comm.mesh import make_mesh, ranks_per_node
from dist_moe.comm.place import Place
from dist_moe.config import Resolved
from dist_moe.config.errors import UserError
from dist_moe.data.corpus import Prepared
from dist_moe.doctor.finding import Finding, Outcome
from dist_moe.doctor.machines import check_exchange, check_places, check_speed, check_versions
from dist_moe.doctor.sizes import check_disk, check_memory, is_bf16, shape_of
from dist_moe.doctor.subject import Subject
from dist_moe.doctor.trials import check_parity, check_saving
from dist_moe.train.loop import prepare_text

NO_TEXT = "there is no text, so nothing can be trained"
SHORTEST_S = 30.0
"""A check that leaves ranks waiting ends after this long, whatever the run's own limit is."""
SEVEREST = (Outcome.failed, Outcome.warned, Outcome.passed, Outcome.idle)

Check = Callable[[Subject], Finding]


def sizes_check(name: str, look: Callable[..., Finding]) -> tuple[str, Check]:
    """A check of memory or disk, which needs the shapes of the whole model."""

    def check(subject: Subject) -> Finding:
        vocabulary = subject.prepared.tokenizer.vocab_size if subject.prepared else 1 << 15
        return look(subject, shape_of(subject.resolved, vocabulary), is_bf16(subject))

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
    limit_s = min(config.parallel.timeout_s, SHORTEST_S)
    with join_world(place, config.parallel.backend, limit_s) as world:
        mesh = make_mesh(resolved.expert_parallel, ranks_per_node(config.parallel.exchange, resolved.expert_parallel))
        limit_groups(limit_s)
        folder.mkdir(parents=True, exist_ok=True)
        subject = Subject(resolved, world, mesh, folder, prepared)
        for name, check in CHECKS:
            if name in NEED_TEXT and any(agreed(lacking)):
                why = next(filter(None, agreed(lacking)))
                told = (
                    Finding(name, Outcome.failed, why, "") if name == "text" else Finding(name, Outcome.idle, NO_TEXT)
                )
                findings.append(told)
                continue
            try:
                findings.append(together(name, check, subject))
            except RuntimeError as error:
                findings.append(Finding(name, Outcome.failed, f"the workers lost each other ({error})", "see above"))
                break
    return findings


def agreed(word: str) -> list[str]:
    """What each rank says."""
    words = [word] * dist.get_world_size()
    if dist.get_world_size() > 1:
        dist.all_gather_object(words, word)
    return words


def together(name: str, check: Check, subject: Subject) -> Finding:
    """A check by all ranks -> the severest of their findings; what a check raises is a failure in its words."""
    try:
        own = check(subject)
    except Exception as error:  # whatever it is, the other checks are worth having
        told = f"rank {subject.mesh.rank}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        own = Finding(name, Outcome.failed, told, "mend what it says, and try again")
    found = [own] * subject.mesh.world_size
    if subject.mesh.world_size > 1:
        dist.all_gather_object(found, own)
    return min(found, key=lambda finding: SEVEREST.index(finding.outcome))
