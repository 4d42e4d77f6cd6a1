"""From which checkpoint a run goes on: the newest good one, the one that it is told, or none."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dist_moe.checkpoint.collective import run_on_all_ranks
from dist_moe.checkpoint.errors import CheckpointError
from dist_moe.checkpoint.file_transfer import FileTransfer, Hosts, broadcast_files, find_hosts
from dist_moe.checkpoint.format.hf_weights import fill_weights
from dist_moe.checkpoint.format.layout import PARTIAL, archive_newer, checkpoints, own_folder, recover, step_of
from dist_moe.checkpoint.format.manifest import NAME, digest, find_damage, read_manifest, unlisted
from dist_moe.checkpoint.format.shard_reader import ShardReader
from dist_moe.checkpoint.training_state import COUNTERS, Counters, read_counters, restore
from dist_moe.comm.mesh import Mesh
from dist_moe.config import Config, load_config
from dist_moe.data.corpus import TokenizedData
from dist_moe.data.source_manifest import difference
from dist_moe.engine.train_state import TrainState
from dist_moe.errors import UserError
from dist_moe.model.task import LanguageModelTask

AUTO, NEVER = "auto", "never"
FETCHED = "borrowed"
RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
"""How often Slurm has queued this job again, and torchrun started its workers again."""
# What another value of makes another run; everything else may change when a run goes on.
# Where the folder of model.pretrained lies does not matter: what it said of the model stands in model.config.
RUN_IDENTITY_FIELDS = (
    "run.seed",
    "model.architecture",
    "model.config",
    "router",
    "data",
    "train.global_batch_size",
    "train.optimizer",
    "balance.policy",
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found good. passed_over: newer ones that were not, and why.

    borrowed: whether some hosts have a copy of it until the run has begun; `folder` is then another on each.
    """

    folder: Path
    counters: Counters
    passed_over: tuple[str, ...] = ()
    borrowed: bool = False


def find_checkpoint(config: Config, prepared: TokenizedData, mesh: Mesh, device: torch.device) -> Checkpoint | None:
    """What `checkpoint.resume` says -> the checkpoint, None where the run begins at its first step.

    A job that its launcher starts again goes on from the run's own checkpoint, if there is one, whatever it was told
    at first. A collective call: the ranks check the files of a checkpoint together.

    Errors: CheckpointError where the path that was given is no good one, where no checkpoint in run.dir is, or where
    it is of another run.
    """
    # One list for all, whatever another host sees.
    looked = run_on_all_ranks(
        mesh, f"{config.run.dir} cannot be used", lambda: _look(config) if mesh.rank == 0 else None
    )
    assert looked[0] is not None
    resume, listed, passed_over = looked[0]
    hosts = find_hosts(mesh, config.cluster.shared_storage)
    for folder in listed:
        wrong = examine(folder, mesh, hosts)
        if wrong is None:
            chosen = partial(_choose, config, prepared, folder, resume) if mesh.rank == 0 else no_op
            counters = run_on_all_ranks(mesh, f"cannot go on from {folder}", chosen)[0]
            assert counters is not None
            found = Checkpoint(folder, counters, tuple(passed_over), any(map(hosts.is_remote, range(mesh.world_size))))
            return fetch_copy(found, config, mesh, hosts, device) if found.borrowed else found
        passed_over.append(wrong)
    if not listed:
        return None
    told = "; ".join(passed_over)
    if resume == AUTO:
        raise CheckpointError(
            f"no checkpoint in {own_folder(config)} can be used: {told}; restore one, or begin anew with "
            "checkpoint.resume=never (what is there is kept)"
        )
    raise CheckpointError(f"checkpoint.resume={resume} cannot be used: {told}")


def no_op() -> None:
    """What ranks do while another does something."""


def _choose(config: Config, prepared: TokenizedData, folder: Path, resume: str) -> Counters:
    counters = read_counters(folder / "state")
    if resume == AUTO:
        check_same_run(config, prepared, folder, counters)
    if folder.resolve().parent == own_folder(config).resolve():
        archive_newer(folder)
    return counters


def fetch_copy(found: Checkpoint, config: Config, mesh: Mesh, hosts: Hosts, device: torch.device) -> Checkpoint:
    """Copy the checkpoint to every host but rank 0's, which has it -> the checkpoint as this rank finds it."""
    told, copy = f"{found.folder} cannot be copied to every host", _fetched(config, found.folder)
    listed = run_on_all_ranks(mesh, told, lambda: read_manifest(found.folder) if mesh.rank == 0 else None)[0]
    assert listed is not None
    transfers = [FileTransfer(name, told_of.bytes, 0) for name, told_of in listed.files.items()]
    leads = hosts.is_remote(mesh.rank) and hosts.is_host_leader(mesh.rank)
    if leads:
        shutil.rmtree(copy, ignore_errors=True)
    run_on_all_ranks(
        mesh, told, lambda: broadcast_files(transfers, mesh, device, found.folder, copy if leads else None)
    )
    wrong = run_on_all_ranks(mesh, told, lambda: find_damage(copy, listed, listed.files) if leads else [])
    if fault := next((fault for part in wrong for fault in part), None):
        raise CheckpointError(f"{told}: {fault}")
    return replace(found, folder=copy) if hosts.is_remote(mesh.rank) else found


def delete_copy(found: Checkpoint, mesh: Mesh) -> None:
    """Remove the copies, once every rank has read what it needs."""
    if found.borrowed:
        copied = found.folder.parent.name == FETCHED
        work = partial(shutil.rmtree, found.folder, ignore_errors=True) if copied else no_op
        run_on_all_ranks(mesh, "the run cannot begin", no_op)
        run_on_all_ranks(mesh, f"{found.folder} cannot be removed", work)


def _fetched(config: Config, folder: Path) -> Path:
    return Path(config.run.dir) / FETCHED / folder.name


def _look(config: Config) -> tuple[str, list[Path], list[str]]:
    """What to go on from, the checkpoints to try in this order, and what of unfinished ones is to be told."""
    own = own_folder(config)
    recover(own)
    again = any(int(os.environ.get(name) or 0) for name in RESTARTS) and is_same_job(config) and bool(checkpoints(own))
    resume = AUTO if again else config.checkpoint.resume
    if resume == NEVER:
        return resume, [], []
    if resume != AUTO:
        return resume, [Path(resume)], []
    unfinished = [path for path in sorted(own.glob(f"step-*{PARTIAL}")) if path.is_dir()]
    for path in unfinished:
        shutil.rmtree(path, ignore_errors=True)
    told = [f"{path} was not finished, and is removed" for path in unfinished]
    return resume, [path for _, path in reversed(checkpoints(own))], told


def is_same_job(config: Config) -> bool:
    """Whether what lies in run.dir is of this very job, which its launcher has started again."""
    try:
        world = json.loads((Path(config.run.dir) / "run.json").read_text(encoding="utf-8"))["world"]
        return world["job"] is not None and world["job"] == job_of(os.environ)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def job_of(environment: Mapping[str, str]) -> str | None:
    """What stays the same of a job that its launcher starts again, and is another for another job; None without one."""
    for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        if environment.get(name):
            return f"{name}={environment[name]}"
    return None


def examine(folder: Path, mesh: Mesh, hosts: Hosts) -> str | None:
    """What is wrong with a checkpoint; None for a good one. A collective call: each rank reads some of the files."""
    near = [rank for rank in range(mesh.world_size) if not hosts.is_remote(rank)]
    work = partial(_own_faults, folder, near.index(mesh.rank), len(near)) if mesh.rank in near else no_op
    try:
        found = [part for part in run_on_all_ranks(mesh, f"{folder} is damaged", work) if part is not None]
    except CheckpointError as error:
        return str(error)
    if any(told != found[0][0] for told, _ in found):
        return f"{folder} is another on another host; share run.dir, or set cluster.shared_storage=false"
    wrong = [fault for _, part in found for fault in part]
    if not wrong:
        return None
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return f"{folder} is damaged: {', '.join(wrong[:3])}{more}"


def _own_faults(folder: Path, index: int, count: int) -> tuple[str | None, list[str]]:
    """The digest of the manifest, and what is wrong with one of `count` shares of the files."""
    manifest, told = read_manifest(folder), digest(folder / NAME)
    named = step_of(folder)
    if named is not None and named != manifest.step:
        return told, [f"its manifest is that of step {manifest.step}"]
    counters = read_counters(folder / "state")
    if counters.step != manifest.step:
        return told, [f"state/{COUNTERS} is that of step {counters.step}"]
    names = sorted(manifest.files)
    strange = unlisted(folder, manifest) if index == 0 else []
    return told, strange + find_damage(folder, manifest, names[index::count])


def check_same_run(config: Config, prepared: TokenizedData, folder: Path, counters: Counters) -> None:
    """CheckpointError where the newest in run.dir is of another run than the config; a path that is given may be."""
    try:
        before = load_config(folder / "config.yaml").model_dump()
    except UserError as error:
        raise CheckpointError(f"{folder / 'config.yaml'} cannot be used ({error})") from None
    now = config.model_dump()
    different = [name for name in RUN_IDENTITY_FIELDS if _at(before, name) != _at(now, name)]
    if (before["model"]["pretrained"] is None) != (now["model"]["pretrained"] is None):
        different.append("model.pretrained")
    if different:
        raise CheckpointError(
            f"{folder} is of a run with another {', '.join(different)}; set another run.dir, or begin anew with "
            "checkpoint.resume=never (what is there is kept), or go on all the same with "
            f"checkpoint.resume={folder}"
        )
    if counters.corpus != prepared.fingerprint:
        changes = difference(prepared.folder.with_name(counters.corpus), prepared.folder)
        raise CheckpointError(
            f"the text of data.sources={config.data.sources} is not the one that {folder} has learned from"
            f"{f' ({changes})' if changes else ''}; restore the files, or begin anew with checkpoint.resume=never"
        )


def _at(values: dict[str, Any], dotted: str) -> Any:
    found: Any = values
    for name in dotted.split("."):
        found = found[name]
    return found


def load_model(checkpoint: Checkpoint, task: LanguageModelTask, mesh: Mesh) -> None:
    """Copy the checkpoint's weights into a model that no engine has yet, in fp32 where it has them."""
    with ShardReader(checkpoint.folder / "state") as reader:
        fill_weights(task.model, mesh, checkpoint.folder / "model", reader)


def restore_run(checkpoint: Checkpoint, training: TrainState) -> None:
    """Set everything else as it was; the engine has been started with the model of `load_model`."""
    restore(training, checkpoint.folder / "state", checkpoint.counters)
    delete_copy(checkpoint, training.engine.mesh)
