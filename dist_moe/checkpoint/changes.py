"""Compares the configuration of a run with that of the checkpoint that it resumes from, field by field."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from dist_moe.checkpoint.errors import CheckpointError
from dist_moe.config import Config, load_stored_config
from dist_moe.config.differences import differences
from dist_moe.errors import ABSENT, Absent, UserError
from dist_moe.text import listed, shown

# A config that differs in one of these fields is that of another run; every other field may change on resume. The paths
# of WEIGHTS_FIELDS are not among them: the folder may be moved, and model.config already describes its model.
RUN_IDENTITY_FIELDS = (
    "run.seed",
    "model.architecture",
    "model.config",
    *(f"model.upcycle_{name}" for name in ("experts", "every", "layers", "noise", "router", "router_std")),
    "router",
    "data",
    "task",
    "train.global_batch_size",
    "train.optimizer",
    "train.frozen_layers",
    "balance.policy",
)
WEIGHTS_FIELDS = ("model.pretrained", "model.upcycle_from")
# Of these, a checkpoint that is given by path may differ in: its weights, moments and tokens keep their meaning.
OPEN_FIELDS = ("run.seed", "train.global_batch_size", "data.sequence_length")
# Where and how a job runs, which is not worth a line.
PLACE_FIELDS = ("run.dir", "checkpoint.resume", *WEIGHTS_FIELDS, "cluster", "slurm", "kubernetes")


Value = Annotated[Absent | Any, Field(union_mode="left_to_right")]
"""A value of a configuration, as JSON can hold it, or ABSENT."""


class Change(NamedTuple):
    """A field that differs between a checkpoint and the run.

    Attributes:
        key: Its dotted path.
        before: Its value in the checkpoint; ABSENT where it has none.
        now: Its value in the run; ABSENT where it has none.
    """

    key: str
    before: Value
    now: Value

    def __str__(self) -> str:
        before, now = ("not set" if value is ABSENT else shown(value) for value in (self.before, self.now))
        return f"{self.key} was {before} and is {now}"

    def is_of(self, fields: Iterable[str]) -> bool:
        """Whether the field is one of `fields`, or below one."""
        return any(f"{self.key}.".startswith(f"{field}.") for field in fields)


def find_changes(config: Config, folder: Path) -> list[Change]:
    """Return the fields of a run that differ from those of the checkpoint in `folder`.

    Raises:
        CheckpointError: Its config.yaml cannot be used.
    """
    try:
        before = load_stored_config(folder / "config.yaml").model_dump(mode="json")
    except UserError as error:
        raise CheckpointError(f"{folder / 'config.yaml'} cannot be used ({error})") from None
    now = config.model_dump(mode="json")
    found = (Change(*difference) for difference in differences(before, now))
    changes = [change for change in found if not change.is_of(PLACE_FIELDS)]
    for field in WEIGHTS_FIELDS:
        name = field.removeprefix("model.")
        values = (before["model"][name], now["model"][name])
        if (values[0] is None) != (values[1] is None):
            changes.append(Change(field, *values))
    return changes


def defines_run(change: Change) -> bool:
    """Whether a run with this change is another one."""
    return change.is_of(RUN_IDENTITY_FIELDS) or change.key in WEIGHTS_FIELDS


def refusal(folder: Path, changes: Iterable[Change]) -> str:
    """Word why a run cannot resume from the newest checkpoint of its folder, with remedies that work."""
    changes = list(changes)
    remedies = ["restore these values to continue that run", "set another run.dir"]
    remedies.append("start again with checkpoint.resume=never (existing files are kept)")
    if all(change.is_of(OPEN_FIELDS) for change in changes):
        remedies.append(f"continue with the new values with checkpoint.resume={folder}")
    return "\n".join(
        [f"{folder} belongs to another run:", *(f"  {change}" for change in changes), listed(remedies, last="or")]
    )


def other_model(folder: Path, changes: Iterable[Change], reason: str) -> str:
    """Word why the weights of a checkpoint do not fit: first the fields that differ, then the tensors."""
    of_model = [change for change in changes if change.is_of(("model", "router", "balance.policy", "data"))]
    if not of_model:
        return reason
    lines = [f"{folder} holds another model:", *(f"  {change}" for change in of_model)]
    return "\n".join([*lines, "restore these values, or give another checkpoint.resume", f"({reason[:400]})"])
