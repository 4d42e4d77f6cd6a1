"""A text that one rank finds changed ends all ranks alike, before anything has moved."""

from pathlib import Path

import torch

from dist_moe.errors import DataError
from dist_moe.train.loop import micro_batches
from dist_moe.train.rank_flags import RankFlags
from dist_moe.train.step import train_step
from tests.dist.pool import RankPool
from tests.dist.resumable import overrides_of, started, write_text
from tests.dist.steps import one_step


def told_of_a_change(rank: int, world_size: int, text: Path, folder: Path) -> tuple[str, bool, float]:
    """Rank 1 tells of a change, and has no batch; then a step as if nothing had been -> the error, and what it left."""
    with started(rank, world_size, overrides_of(text, folder)) as (resolved, training):
        before = [parameter.detach().clone() for parameter in training.task.parameters()]
        batches = [part.of(training.stream) for part in micro_batches(resolved, training.engine.mesh, 1)]
        flags = RankFlags(data_changed="train.tokens has 1 byte" if rank == 1 else "")
        told = ""
        try:
            one_step(resolved, training, 1, flags)
        except DataError as error:
            told = str(error)
        same = all(torch.equal(one, now) for one, now in zip(before, training.task.parameters(), strict=True))
        return told, same, train_step(training.engine, training.balancer, batches, 0.01).grad_norm


def test_all_ranks_end_by_the_change_that_one_has_seen(ranks: RankPool, tmp_path: Path) -> None:
    found = ranks.run(told_of_a_change, 2, write_text(tmp_path), tmp_path / "run")
    assert found[0] == found[1]
    told, same, grad_norm = found[0]
    assert told.startswith("train.tokens has 1 byte while the run was reading it (rank 1); start the run again")
    assert same and grad_norm > 0
