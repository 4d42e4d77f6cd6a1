"""Errors of checkpoints and weights folders."""

from dist_moe.errors import UserError

USE_ANOTHER = "use another checkpoint"


def without_remedy(error: Exception) -> str:
    """The message of an error about a checkpoint without its last part, for a message with a remedy of its own."""
    rule, _, remedy = str(error).rpartition("; ")
    return rule or remedy


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be written or read; the message has the checkpoint, the reason and the remedy."""


class JobCheckpointError(CheckpointError):
    """A failure on one rank that every rank reports, with the same message."""


class RunChangedError(CheckpointError):
    """The configuration or the text of a run is not that of the checkpoint; every rank reports the same."""


class WeightsError(UserError, ValueError):
    """A weights folder does not match the model; the message lists every missing and unexpected tensor."""
