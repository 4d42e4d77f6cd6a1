"""Errors of checkpoints and of weights folders."""

from dist_moe.errors import UserError


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be written or used: which, why, and what to do."""


class WeightsError(UserError, ValueError):
    """A weights folder that does not fit; the message lists every tensor that is missing or unexpected."""
