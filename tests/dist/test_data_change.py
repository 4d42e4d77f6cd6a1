"""A data file that one rank finds modified ends the step on all ranks, before any state changes."""

from pathlib import Path

import torch

from dist_moe.errors import DataError
from dist_moe.train.loop import micro_batches
from dist_moe.train.rank_flags import RankFlags
from dist_moe.train.step import train_step
from tests.dist.pool import RankPool
from tests.dist.resumable import overrides_of, started, write_text
from tests.dist.steps import one_step


def step_with_a_change(rank: int, world_size: int, text: Path, folder: Path) -> tuple[str, bool, float]:
    """Take a step in which rank 1 reports a change, then one without.

    Returns:
        The error of the first step, whether the parameters were unchanged after it, and the second gradient norm.
    """
    with started(rank, world_size, overrides_of(text, folder)) as (resolved, training):
        before = [parameter.detach().clone() for parameter in training.task.parameters()]
        batches = [
            training.stream.batch(part.first, part.count) for part in micro_batches(resolved, training.engine.mesh, 1)
        ]
        flags = RankFlags(data_changed="train.tokens has 1 byte" if rank == 1 else "")
        message = ""
        try:
            one_step(resolved, training, 1, flags)
        except DataError as error:
            message = str(error)
        unchanged = all(torch.equal(old, new) for old, new in zip(before, training.task.parameters(), strict=True))
        return message, unchanged, train_step(training.engine, training.balancer, batches, 0.01).grad_norm


def test_a_change_that_one_rank_reports_raises_on_all_ranks(ranks: RankPool, tmp_path: Path) -> None:
    results = ranks.run(step_with_a_change, 2, write_text(tmp_path), tmp_path / "run")
    assert results[0] == results[1]
    message, unchanged, grad_norm = results[0]
    assert message.startswith("train.tokens has 1 byte while the run was reading it (rank 1); start the run again")
    assert unchanged and grad_norm > 0
