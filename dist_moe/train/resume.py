"""From which checkpoint a run goes on: the newest good one, the one that it is told, or none."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dist_moe.comm.mesh import Mesh
from dist_moe.config import Config, load_config
from dist_moe.config.errors import UserError
from dist_moe.data.corpus import Prepared
from dist_moe.model.task import LanguageModelTask
from dist_moe.train.checkpoint import PARTIAL, Result, checkpoints, recover, step_of, together
from dist_moe.train.elements import CheckpointError, ElementReader
from dist_moe.train.manifest import faults, read_manifest
from dist_moe.train.state import Numbers, Training, read_numbers, restore
from dist_moe.train.weights import fill_weights

AUTO, NEVER = "auto", "never"
RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
"""How often Slurm has queued this job again, and torchrun started its workers again."""
# What another value of makes another run; everything else may change when a run goes on.
DECIDING = ("run.seed", "model", "router", "data", "train.global_batch", "train.optimizer", "balance.policy")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found good. passed_over: newer ones that were not, and why."""

    folder: Path
    numbers: Numbers
    passed_over: tuple[str, ...] = ()


def find_checkpoint(config: Config, prepared: Prepared, mesh: Mesh) -> Checkpoint | None:
    """What `checkpoint.resume` says -> the checkpoint, None where the run begins at its first step.

    A job that its launcher starts again goes on from the run's own checkpoint, if there is one, whatever it was told
    at first. A collective call: the ranks check the files of a checkpoint together.

    Errors: CheckpointError where the path that was given is no good one, where no checkpoint in run.dir is, or where
    it is of another run.
    """
    own = Path(config.run.dir) / "checkpoints"
    if mesh.rank == 0:
        recover(own)
    again = any(int(os.environ.get(name) or 0) for name in RESTARTS) and bool(checkpoints(own))
    resume = _of_first(mesh, AUTO if again else config.checkpoint.resume)
    if resume == NEVER:
        return None
    listed = [path for _, path in reversed(checkpoints(own))] if resume == AUTO else [Path(resume)]
    # One list for all, whatever another host sees.
    listed = _of_first(mesh, listed)
    passed_over = _of_first(mesh, _unfinished(own) if resume == AUTO else [])
    for folder in listed:
        wrong = examine(folder, mesh)
        if wrong is None:
            numbers = read_numbers(folder / "state")
            if resume == AUTO:
                check_same_run(config, prepared, folder, numbers)
            return Checkpoint(folder, numbers, tuple(passed_over))
        passed_over.append(wrong)
    if not listed:
        return None
    told = "; ".join(passed_over)
    if resume == AUTO:
        raise CheckpointError(
            f"no checkpoint in {own} can be used: {told}; restore one, or begin anew with checkpoint.resume=never "
            "(what is there is kept)"
        )
    raise CheckpointError(f"checkpoint.resume={resume} cannot be used: {told}")


def examine(folder: Path, mesh: Mesh) -> str | None:
    """What is wrong with a checkpoint; None for a good one. A collective call: each rank reads some of the files."""
    try:
        found = together(mesh, f"{folder} is damaged", lambda: _own_faults(folder, mesh))
    except CheckpointError as error:
        return str(error)
    wrong = [fault for part in found for fault in part]
    if not wrong:
        return None
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return f"{folder} is damaged: {', '.join(wrong[:3])}{more}"


def _own_faults(folder: Path, mesh: Mesh) -> list[str]:
    manifest = read_manifest(folder)
    named = step_of(folder)
    if named is not None and named != manifest.step:
        return [f"its manifest is that of step {manifest.step}"]
    read_numbers(folder / "state")
    names = sorted(manifest.files)
    return faults(folder, manifest, names[mesh.rank :: mesh.world_size])


def check_same_run(config: Config, prepared: Prepared, folder: Path, numbers: Numbers) -> None:
    """CheckpointError where the newest in run.dir is of another run than the config; a path that is given may be."""
    try:
        before = load_config(folder / "config.yaml").model_dump()
    except UserError as error:
        raise CheckpointError(f"{folder / 'config.yaml'} cannot be used ({error})") from None
    now = config.model_dump()
    different = [name for name in DECIDING if _at(before, name) != _at(now, name)]
    if different:
        raise CheckpointError(
            f"{folder} is of a run with another {', '.join(different)}; set another run.dir, or begin anew with "
            "checkpoint.resume=never (what is there is kept), or go on all the same with "
            f"checkpoint.resume={folder}"
        )
    if numbers.corpus != prepared.fingerprint:
        raise CheckpointError(
            f"the text of data.sources={config.data.sources} is not the one that {folder} has learned from; restore "
            "the files, or begin anew with checkpoint.resume=never"
        )


def _at(values: dict[str, Any], dotted: str) -> Any:
    found: Any = values
    for name in dotted.split("."):
        found = found[name]
    return found


def _unfinished(own: Path) -> list[str]:
    return [f"{path} was not finished" for path in sorted(own.glob(f"step-*{PARTIAL}"))]


def _of_first(mesh: Mesh, value: Result) -> Result:
    """Rank 0's value, on every rank."""
    values = [value]
    if mesh.world_size > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def load_model(checkpoint: Checkpoint, task: LanguageModelTask, mesh: Mesh) -> None:
    """Copy the checkpoint's weights into a model that no engine has yet, in fp32 where it has them."""
    with ElementReader(checkpoint.folder / "state") as reader:
        fill_weights(task.model, mesh, checkpoint.folder / "model", reader)


def go_on(checkpoint: Checkpoint, training: Training) -> None:
    """Set everything else as it was; the engine has been started with the model of `load_model`."""
    restore(training, checkpoint.folder / "state", checkpoint.numbers)
