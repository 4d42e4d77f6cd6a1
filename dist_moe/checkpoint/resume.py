"""Finds the checkpoint that a run resumes from (the newest intact one, the configured one, or none) and loads it."""

import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from dist_moe.checkpoint.changes import Change, defines_run, find_changes, other_model, refusal
from dist_moe.checkpoint.collective import run_on_all_ranks
from dist_moe.checkpoint.errors import USE_ANOTHER, CheckpointError, RunChangedError, WeightsError, without_remedy
from dist_moe.checkpoint.file_transfer import FileTransfer, Hosts, broadcast_files, find_hosts
from dist_moe.checkpoint.format.hf_weights import fill_weights
from dist_moe.checkpoint.format.layout import PARTIAL, archive_newer, checkpoints_root, recover, step_folders, step_of
from dist_moe.checkpoint.format.manifest import (
    MANIFEST_NAME,
    Manifest,
    digest_if_readable,
    find_damage,
    find_unlisted,
    read_manifest,
)
from dist_moe.checkpoint.format.shard_reader import ShardReader
from dist_moe.checkpoint.training_state import COUNTERS_FILE, Counters, read_counters, restore_state
from dist_moe.comm.mesh import Mesh
from dist_moe.config import Config
from dist_moe.data.source_manifest import describe_changes
from dist_moe.engine.train_state import RunData, TrainState
from dist_moe.model.tasks.base import Task
from dist_moe.text import listed
from dist_moe.untrusted import read_json

logger = logging.getLogger(__name__)

AUTO, NEVER = "auto", "never"
COPIES_FOLDER = "fetched"
RESTART_COUNT_VARS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
"""How often Slurm has requeued this job, and how often torchrun has restarted its workers."""


@dataclass(frozen=True)
class Checkpoint:
    """An intact checkpoint to resume from.

    Attributes:
        folder: Where this rank reads it.
        counters: The content of its state/training.json.
        passed_over: For each newer checkpoint that was not used, the reason.
        fetched: Whether hosts without the checkpoint hold a copy until it is restored; `folder` differs by host then.
        changes: The fields of the configuration that have changed since it was written.
        is_copy: Whether `folder` is such a copy.
    """

    folder: Path
    counters: Counters
    passed_over: tuple[str, ...] = ()
    fetched: bool = False
    changes: tuple[Change, ...] = ()
    is_copy: bool = False


class Candidates(NamedTuple):
    """The checkpoints to try.

    Attributes:
        resume: `checkpoint.resume`, or `auto` in a restarted job.
        folders: In this order.
        messages: About incomplete checkpoints.
    """

    resume: str
    folders: list[Path]
    messages: list[str]


class AcceptedCheckpoint(NamedTuple):
    """What rank 0 sends to the other ranks about a checkpoint from which the run may resume."""

    counters: Counters
    changes: list[Change]


def find_checkpoint(config: Config, tokenized: RunData, mesh: Mesh, device: torch.device) -> Checkpoint | None:
    """Find the checkpoint that `checkpoint.resume` asks for. A collective call: the ranks check its files together.

    A job that its launcher restarts resumes from its own checkpoint, if any, regardless of `checkpoint.resume`.

    Returns:
        The checkpoint; None if the run starts at its first step.

    Raises:
        CheckpointError: On every rank, if the given path is not an intact checkpoint, if run.dir has checkpoints and
            none of them is intact, or if the newest belongs to another run.
    """
    # Rank 0 decides for all: another host may see other files.
    what = f"{config.run.dir} cannot be used"
    results = run_on_all_ranks(mesh, what, lambda: candidates(config) if mesh.rank == 0 else None, Candidates | None)
    assert results[0] is not None
    resume, folders, passed_over = results[0]
    hosts = find_hosts(mesh, config.cluster.shared_storage)
    for folder in folders:
        damage = check_checkpoint(folder, mesh, hosts)
        if damage is None:
            accept = partial(_accept, config, tokenized, folder, resume) if mesh.rank == 0 else no_op
            what = f"cannot resume from {folder}"
            accepted = run_on_all_ranks(mesh, what, accept, AcceptedCheckpoint | str | None)[0]
            if isinstance(accepted, str):
                raise RunChangedError(accepted)
            assert accepted is not None
            fetched = any(map(hosts.is_remote, range(mesh.world_size)))
            checkpoint = Checkpoint(folder, accepted.counters, tuple(passed_over), fetched, tuple(accepted.changes))
            logger.info("resuming from %s (checkpoint.resume=%s, fetched=%s)", folder, resume, fetched)
            return fetch_copy(checkpoint, config, mesh, hosts, device) if fetched else checkpoint
        passed_over.append(damage)
    if not folders:
        logger.info("no checkpoint to resume from (checkpoint.resume=%s)", resume)
        return None
    reasons = "; ".join(passed_over)
    if resume == AUTO:
        raise CheckpointError(
            f"no checkpoint in {checkpoints_root(config)} can be used: {reasons}; restore one, or start again with "
            "checkpoint.resume=never (existing files are kept)"
        )
    raise CheckpointError(f"checkpoint.resume={resume} cannot be used: {reasons}; {USE_ANOTHER}")


def no_op() -> None:
    """Do nothing, while other ranks work."""


def _accept(config: Config, tokenized: RunData, folder: Path, resume: str) -> AcceptedCheckpoint | str:
    """Check that the checkpoint belongs to this run, and archive newer ones. On rank 0.

    Returns:
        The checkpoint's counters and what has changed since, or why the checkpoint is refused.
    """
    counters = read_counters(folder / "state")
    try:
        changes = (
            check_same_run(config, tokenized, folder, counters) if resume == AUTO else find_changes(config, folder)
        )
    except RunChangedError as error:
        return str(error)
    if folder.resolve().parent == checkpoints_root(config).resolve():
        archive_newer(folder)
    return AcceptedCheckpoint(counters, changes)


def fetch_copy(checkpoint: Checkpoint, config: Config, mesh: Mesh, hosts: Hosts, device: torch.device) -> Checkpoint:
    """Copy the checkpoint from rank 0's host to every other host. A collective call.

    Returns:
        The checkpoint with the folder that this rank reads.

    Raises:
        CheckpointError: On every rank, if a copy failed.
    """
    what = f"{checkpoint.folder} cannot be copied to every host"
    # Its last part may be `..`, and the copy is deleted.
    copy = Path(config.run.dir, COPIES_FOLDER, Path(os.path.normpath(checkpoint.folder)).name)
    read = partial(read_manifest, checkpoint.folder) if mesh.rank == 0 else no_op
    manifest = run_on_all_ranks(mesh, what, read, Manifest | None)[0]
    assert manifest is not None
    transfers = [FileTransfer(name, entry.bytes, 0) for name, entry in manifest.files.items()]
    receives = hosts.is_remote(mesh.rank) and hosts.is_host_leader(mesh.rank)
    if receives:
        shutil.rmtree(copy, ignore_errors=True)
    target = copy if receives else None
    run_on_all_ranks(mesh, what, lambda: broadcast_files(transfers, mesh, device, checkpoint.folder, target))
    damage = run_on_all_ranks(
        mesh, what, lambda: find_damage(copy, manifest, manifest.files) if receives else [], list[str]
    )
    if first := next((message for messages in damage for message in messages), None):
        raise CheckpointError(f"{what}: {first}")
    return replace(checkpoint, folder=copy, is_copy=True) if hosts.is_remote(mesh.rank) else checkpoint


def delete_copy(checkpoint: Checkpoint, mesh: Mesh) -> None:
    """Delete the copies of `fetch_copy` when every rank has read them. A collective call."""
    if checkpoint.fetched:
        work = partial(shutil.rmtree, checkpoint.folder, ignore_errors=True) if checkpoint.is_copy else no_op
        # A barrier: a rank that is still reading would lose its files.
        run_on_all_ranks(mesh, "the run cannot start", no_op)
        run_on_all_ranks(mesh, f"{checkpoint.folder} cannot be removed", work)


def candidates(config: Config) -> Candidates:
    """Return the checkpoints to try; incomplete ones are removed."""
    root = checkpoints_root(config)
    recover(root)
    restarted = any(int(os.environ.get(name) or 0) for name in RESTART_COUNT_VARS)
    resume = AUTO if restarted and is_same_job(config) and step_folders(root) else config.checkpoint.resume
    if resume == NEVER:
        return Candidates(resume, [], [])
    if resume != AUTO:
        return Candidates(resume, [Path(resume)], [])
    incomplete = [path for path in sorted(root.glob(f"step-*{PARTIAL}")) if path.is_dir()]
    for path in incomplete:
        shutil.rmtree(path, ignore_errors=True)
    messages = [f"{path} was incomplete and has been removed" for path in incomplete]
    return Candidates(resume, [path for _, path in reversed(step_folders(root))], messages)


def is_same_job(config: Config) -> bool:
    """Whether the files in run.dir were written by this job, before its launcher restarted it."""
    try:
        world = read_json(Path(config.run.dir) / "run.json")["world"]
        return world["job"] is not None and world["job"] == job_id(os.environ)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def job_id(environment: Mapping[str, str]) -> str | None:
    """An identifier that a restart by the launcher does not change, and that no other job has; None without one."""
    for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        if environment.get(name):
            return f"{name}={environment[name]}"
    return None


def check_checkpoint(folder: Path, mesh: Mesh, hosts: Hosts) -> str | None:
    """Check every file of a checkpoint. A collective call: each rank of rank 0's hosts reads a part of the files.

    Returns:
        What is wrong with the checkpoint; None if it is intact.
    """
    readers = [rank for rank in range(mesh.world_size) if not hosts.is_remote(rank)]
    work = partial(_check_part, folder, readers.index(mesh.rank), len(readers)) if mesh.rank in readers else no_op
    try:
        results = run_on_all_ranks(mesh, f"{folder} is damaged", work, tuple[str | None, list[str]] | None)
    except CheckpointError as error:
        return without_remedy(error)
    parts = [part for part in results if part is not None]
    if any(digest != parts[0][0] for digest, _ in parts):
        return f"{folder} differs between hosts; share run.dir, or set cluster.shared_storage=false"
    damage = [message for _, messages in parts for message in messages]
    if not damage:
        return None
    return f"{folder} is damaged: {listed(damage, last='and', most=3)}"


def _check_part(folder: Path, index: int, count: int) -> tuple[str | None, list[str]]:
    """Check part `index` of `count` of the files -> (digest of the manifest, messages about damage)."""
    manifest, digest = read_manifest(folder), digest_if_readable(folder / MANIFEST_NAME)
    step = step_of(folder)
    if step is not None and step != manifest.step:
        return digest, [f"its manifest is that of step {manifest.step}"]
    counters = read_counters(folder / "state")
    if counters.step != manifest.step:
        return digest, [f"state/{COUNTERS_FILE} is that of step {counters.step}"]
    names = sorted(manifest.files)
    unlisted = find_unlisted(folder, manifest) if index == 0 else []
    return digest, unlisted + find_damage(folder, manifest, names[index::count])


def check_same_run(config: Config, tokenized: RunData, folder: Path, counters: Counters) -> list[Change]:
    """Check that the newest checkpoint in run.dir belongs to the configured run; a checkpoint given by path need not.

    Returns:
        The fields that changed and may.

    Raises:
        RunChangedError: A field of RUN_IDENTITY_FIELDS differs, or the text; with every field that does.
    """
    changes = find_changes(config, folder)
    if different := [change for change in changes if defines_run(change)]:
        raise RunChangedError(refusal(folder, different))
    if counters.corpus != tokenized.fingerprint:
        files = describe_changes(tokenized.folder.with_name(counters.corpus), tokenized.folder)
        raise RunChangedError(
            f"the text of data.sources={config.data.sources} is not the one that {folder} was trained on"
            f"{f' ({files})' if files else ''}; restore the files, or start again with checkpoint.resume=never"
        )
    return changes


def load_model(checkpoint: Checkpoint, task: Task, mesh: Mesh) -> None:
    """Copy the checkpoint's weights, fp32 masters where stored, into a model that no engine wraps yet.

    Raises:
        RunChangedError: The checkpoint holds another model, in any tensor.
    """
    try:
        with ShardReader(checkpoint.folder / "state") as reader:
            fill_weights(task.model, mesh, checkpoint.folder / "model", reader)
    except WeightsError as error:
        raise RunChangedError(other_model(checkpoint.folder, checkpoint.changes, str(error))) from None


def restore(checkpoint: Checkpoint, train_state: TrainState) -> list[str]:
    """Restore everything but the weights; the engine must have been started with the model of `load_model`.

    Returns:
        Lines for the log.
    """
    notes = restore_state(train_state, checkpoint.folder / "state", checkpoint.counters)
    delete_copy(checkpoint, train_state.engine.mesh)
    return notes
