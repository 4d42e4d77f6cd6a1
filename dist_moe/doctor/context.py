"""The inputs of every check: the resolved configuration and the running process group."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from dist_moe.comm.init import DistContext
from dist_moe.comm.mesh import Mesh
from dist_moe.config import Config, Resolved
from dist_moe.engine.precision import choose_precision
from dist_moe.engine.train_state import RunData


def experts_per_token(config: Config) -> int:
    """Experts that a token takes, for estimates.

    This is top-K, with expert thresholds on average; with threshold routing the target number of experts, or without a
    target the largest number.
    """
    router = config.router
    if router.selection == "threshold" and router.target_experts_per_token:
        return math.ceil(router.target_experts_per_token)
    if router.selection == "expert_threshold":
        return router.top_k or 1
    return router.max_experts or router.top_k or 1


@dataclass(frozen=True)
class DoctorContext:
    """What a check has to work with.

    Attributes:
        resolved: The configuration, resolved for this number of workers.
        dist_context: The process group that the workers have joined.
        mesh: The layout of the run.
        folder: A temporary folder on the file system of run.dir.
        tokenized: The tokenized text; None where it is not available.
        limit_s: Timeout of a collective, in seconds.
    """

    resolved: Resolved
    dist_context: DistContext
    mesh: Mesh
    folder: Path
    tokenized: RunData | None
    limit_s: float = 30.0

    @property
    def config(self) -> Config:
        """The resolved configuration."""
        return self.resolved.config

    @cached_property
    def message_bytes(self) -> int:
        """Bytes that a rank sends in one all-to-all of a micro-batch, approximately."""
        tokens = self.config.train.sequences_per_forward * self.config.data.sequence_length
        width = int(self.resolved.model_config.get("hidden_size", 1024))
        return tokens * experts_per_token(self.config) * width * (2 if self.bf16 else 4)

    @property
    def bf16(self) -> bool:
        """Whether the run computes in bf16 on this device."""
        return choose_precision(self.config.train.precision, self.dist_context.device) == torch.bfloat16
