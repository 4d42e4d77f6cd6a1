"""What is examined: the configuration as it would run, in a job of real workers."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from dist_moe.comm.init import DistContext
from dist_moe.comm.mesh import Mesh
from dist_moe.config import Config, Resolved
from dist_moe.data.corpus import TokenizedData
from dist_moe.engine.precision import choose_precision


def experts_taken(config: Config) -> int:
    """How many experts a token takes: top-K; with a threshold the budget, and where there is none at most so many."""
    router = config.router
    if router.selection == "threshold" and router.target_experts_per_token:
        return math.ceil(router.target_experts_per_token)
    return router.max_experts or router.top_k or 1


@dataclass(frozen=True)
class DoctorContext:
    """resolved: for this number of workers. folder: of the doctor alone, on the file system of run.dir.

    prepared: the text; None where it could not be had. limit_s: how long a collective of a check may take.
    """

    resolved: Resolved
    dist_context: DistContext
    mesh: Mesh
    folder: Path
    prepared: TokenizedData | None
    limit_s: float = 30.0

    @property
    def config(self) -> Config:
        """The resolved one."""
        return self.resolved.config

    @cached_property
    def message_bytes(self) -> int:
        """About what a rank sends in one exchange of a micro-batch."""
        tokens = self.config.train.micro_batch_size * self.config.data.sequence_length
        width = int(self.resolved.model_config.get("hidden_size", 1024))
        return tokens * experts_taken(self.config) * width * (2 if self.bf16 else 4)

    @property
    def bf16(self) -> bool:
        """Whether the run will compute in bf16 here."""
        return choose_precision(self.config.train.precision, self.dist_context.device) == torch.bfloat16
