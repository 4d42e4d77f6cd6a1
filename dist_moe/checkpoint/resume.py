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

from dist_moe.checkpoint.collective import together
from dist_moe.checkpoint.errors import CheckpointError
from dist_moe.checkpoint.file_transfer import Hosts, Parcel, deliver, find_hosts
from dist_moe.checkpoint.format.hf_weights import fill_weights
from dist_moe.checkpoint.format.layout import PARTIAL, checkpoints, own_folder, recover, set_later_aside, step_of
from dist_moe.checkpoint.format.manifest import NAME, digest, faults, read_manifest, unlisted
from dist_moe.checkpoint.format.shard_reader import ElementReader
from dist_moe.checkpoint.training_state import NUMBERS, Numbers, read_numbers, restore
from dist_moe.comm.mesh import Mesh
from dist_moe.config import Config, load_config
from dist_moe.data.corpus import Prepared
from dist_moe.data.source_manifest import difference
from dist_moe.engine.train_state import Training
from dist_moe.errors import UserError
from dist_moe.model.task import LanguageModelTask

AUTO, NEVER = "auto", "never"
BORROWED = "borrowed"
RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
"""How often Slurm has queued this job again, and torchrun started its workers again."""
# What another value of makes another run; everything else may change when a run goes on.
# Where the folder of model.pretrained lies does not matter: what it said of the model stands in model.config.
DECIDING = (
    "run.seed",
    "model.architecture",
    "model.config",
    "router",
    "data",
    "train.global_batch",
    "train.optimizer",
    "balance.policy",
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found good. passed_over: newer ones that were not, and why.

    borrowed: whether some hosts have a copy of it until the run has begun; `folder` is then another on each.
    """

    folder: Path
    numbers: Numbers
    passed_over: tuple[str, ...] = ()
    borrowed: bool = False


def find_checkpoint(config: Config, prepared: Prepared, mesh: Mesh, device: torch.device) -> Checkpoint | None:
    """What `checkpoint.resume` says -> the checkpoint, None where the run begins at its first step.

    A job that its launcher starts again goes on from the run's own checkpoint, if there is one, whatever it was told
    at first. A collective call: the ranks check the files of a checkpoint together.

    Errors: CheckpointError where the path that was given is no good one, where no checkpoint in run.dir is, or where
    it is of another run.
    """
    # One list for all, whatever another host sees.
    looked = together(mesh, f"{config.run.dir} cannot be used", lambda: _look(config) if mesh.rank == 0 else None)
    assert looked[0] is not None
    resume, listed, passed_over = looked[0]
    hosts = find_hosts(mesh, config.cluster.shared_storage)
    for folder in listed:
        wrong = examine(folder, mesh, hosts)
        if wrong is None:
            chosen = partial(_choose, config, prepared, folder, resume) if mesh.rank == 0 else nothing
            numbers = together(mesh, f"cannot go on from {folder}", chosen)[0]
            assert numbers is not None
            found = Checkpoint(folder, numbers, tuple(passed_over), any(map(hosts.far, range(mesh.world_size))))
            return borrow(found, config, mesh, hosts, device) if found.borrowed else found
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


def nothing() -> None:
    """What ranks do while another does something."""


def _choose(config: Config, prepared: Prepared, folder: Path, resume: str) -> Numbers:
    numbers = read_numbers(folder / "state")
    if resume == AUTO:
        check_same_run(config, prepared, folder, numbers)
    if folder.resolve().parent == own_folder(config).resolve():
        set_later_aside(folder)
    return numbers


def borrow(found: Checkpoint, config: Config, mesh: Mesh, hosts: Hosts, device: torch.device) -> Checkpoint:
    """Copy the checkpoint to every host but rank 0's, which has it -> the checkpoint as this rank finds it."""
    told, copy = f"{found.folder} cannot be copied to every host", _borrowed(config, found.folder)
    listed = together(mesh, told, lambda: read_manifest(found.folder) if mesh.rank == 0 else None)[0]
    assert listed is not None
    parcels = [Parcel(name, told_of.bytes, 0) for name, told_of in listed.files.items()]
    leads = hosts.far(mesh.rank) and hosts.leads(mesh.rank)
    if leads:
        shutil.rmtree(copy, ignore_errors=True)
    together(mesh, told, lambda: deliver(parcels, mesh, device, found.folder, copy if leads else None))
    wrong = together(mesh, told, lambda: faults(copy, listed, listed.files) if leads else [])
    if fault := next((fault for part in wrong for fault in part), None):
        raise CheckpointError(f"{told}: {fault}")
    return replace(found, folder=copy) if hosts.far(mesh.rank) else found


def give_back(found: Checkpoint, mesh: Mesh) -> None:
    """Remove the copies, once every rank has read what it needs."""
    if found.borrowed:
        copied = found.folder.parent.name == BORROWED
        work = partial(shutil.rmtree, found.folder, ignore_errors=True) if copied else nothing
        together(mesh, "the run cannot begin", nothing)
        together(mesh, f"{found.folder} cannot be removed", work)


def _borrowed(config: Config, folder: Path) -> Path:
    return Path(config.run.dir) / BORROWED / folder.name


def _look(config: Config) -> tuple[str, list[Path], list[str]]:
    """What to go on from, the checkpoints to try in this order, and what of unfinished ones is to be told."""
    own = own_folder(config)
    recover(own)
    again = any(int(os.environ.get(name) or 0) for name in RESTARTS) and _begun(config) and bool(checkpoints(own))
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


def _begun(config: Config) -> bool:
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
    near = [rank for rank in range(mesh.world_size) if not hosts.far(rank)]
    work = partial(_own_faults, folder, near.index(mesh.rank), len(near)) if mesh.rank in near else nothing
    try:
        found = [part for part in together(mesh, f"{folder} is damaged", work) if part is not None]
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
    numbers = read_numbers(folder / "state")
    if numbers.step != manifest.step:
        return told, [f"state/{NUMBERS} is that of step {numbers.step}"]
    names = sorted(manifest.files)
    strange = unlisted(folder, manifest) if index == 0 else []
    return told, strange + faults(folder, manifest, names[index::count])


def check_same_run(config: Config, prepared: Prepared, folder: Path, numbers: Numbers) -> None:
    """CheckpointError where the newest in run.dir is of another run than the config; a path that is given may be."""
    try:
        before = load_config(folder / "config.yaml").model_dump()
    except UserError as error:
        raise CheckpointError(f"{folder / 'config.yaml'} cannot be used ({error})") from None
    now = config.model_dump()
    different = [name for name in DECIDING if _at(before, name) != _at(now, name)]
    if (before["model"]["pretrained"] is None) != (now["model"]["pretrained"] is None):
        different.append("model.pretrained")
    if different:
        raise CheckpointError(
            f"{folder} is of a run with another {', '.join(different)}; set another run.dir, or begin anew with "
            "checkpoint.resume=never (what is there is kept), or go on all the same with "
            f"checkpoint.resume={folder}"
        )
    if numbers.corpus != prepared.fingerprint:
        changes = difference(prepared.folder.with_name(numbers.corpus), prepared.folder)
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
    with ElementReader(checkpoint.folder / "state") as reader:
        fill_weights(task.model, mesh, checkpoint.folder / "model", reader)


def go_on(checkpoint: Checkpoint, training: Training) -> None:
    """Set everything else as it was; the engine has been started with the model of `load_model`."""
    restore(training, checkpoint.folder / "state", checkpoint.numbers)
    give_back(checkpoint, training.engine.mesh)
