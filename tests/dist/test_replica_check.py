"""Ranks that have to hold the same bits: that they do, and that one which does not is found and named."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from dist_moe.engine.train_state import TrainState
from dist_moe.health.replica_check import ReplicaError, check_replicas, digest
from tests.dist.pool import RankPool
from tests.dist.resumable import overrides_of, started, write_text
from tests.dist.steps import one_step
from tests.selection import cross

EVERY = "observe.replica_check_interval=2"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def flip(tensor: Tensor) -> None:
    """Change the lowest bit of the last element."""
    tensor.detach().view(-1)[-1:].view(torch.uint8)[0] ^= 1


def dense(training: TrainState) -> None:
    flip(training.task.get_parameter("model.model.layers.0.mlp.down_proj.weight"))


def bias(training: TrainState) -> None:
    flip(training.task.layers[1].router.selection_bias)


def memory(training: TrainState) -> None:
    flip(training.balancer.memory[training.task.layers[1].name]["momentum"])


def expert(training: TrainState) -> None:
    flip(training.task.layers[0].experts.local.get_parameter("down_proj"))


def count(training: TrainState) -> None:
    training.balancer.steps_taken += 1


Spoil = Callable[[TrainState], None]


def compared(
    rank: int, world_size: int, text: Path, folder: Path, words: tuple[str, ...], spoil: Spoil, at: int
) -> list[str]:
    """Two steps and a comparison; then rank `at` is spoiled, after an odd step and an even one compared again."""
    found = []
    with started(rank, world_size, overrides_of(text, folder, EVERY, *words)) as (resolved, training):
        for step in range(1, 5):
            if step < 3:
                one_step(resolved, training, step)
            elif step == 3 and rank == at:
                spoil(training)
            try:
                check_replicas(training, step)
            except ReplicaError as error:
                found.append(str(error))
    return found


ALONE = "rank 2 differs from the 3 others in "
NAMES: dict[Spoil, str] = {
    dense: f"{ALONE}model.model.layers.0.mlp.down_proj.weight; they were equal after step 2",
    bias: f"{ALONE}model.layers.2.mlp.selection_bias; ",
    memory: f"{ALONE}model.layers.2.mlp.memory.momentum; ",
    count: f"{ALONE}balance: steps taken; ",
    expert: "ranks 0, 2 differ, and there is no majority in model.model.layers.1.mlp.experts.local.down_proj; ",
}


@pytest.mark.parametrize("spoil", NAMES)
def test_trap_T10_a_rank_that_differs_in_one_bit_is_named(
    ranks: RankPool, text: Path, tmp_path: Path, spoil: Spoil
) -> None:
    """The error is the same on all ranks, at the next compared step and not before."""
    words = ("parallel.expert_parallel=2", *(["balance.policy=momentum"] if spoil is memory else []))
    answers = ranks.run(compared, 4, text, tmp_path, words, spoil, 2)
    assert all(answer == answers[0] and len(answer) == 1 for answer in answers)
    assert "replicas differ after step 4: " in answers[0][0]
    assert NAMES[spoil] in answers[0][0]


@cross(("precision", ["fp32", "bf16"]), ("stage", [0, 1, 2]), strength=1)
def test_ranks_hold_the_same_bits(ranks: RankPool, text: Path, tmp_path: Path, stage: int, precision: str) -> None:
    words = (f"parallel.zero_stage={stage}", f"train.precision={precision}", "parallel.expert_parallel=2")
    assert ranks.run(compared, 4, text, tmp_path, words, count, -1) == [[], [], [], []]


@settings(deadline=None, max_examples=200)
@given(some.integers(1, 5000), some.data())
def test_every_bit_changes_the_digest(size: int, draw: some.DataObject) -> None:
    """A tensor of NaN with a payload too."""
    content = torch.frombuffer(bytearray(draw.draw(some.randoms()).randbytes(4 * size)), dtype=torch.uint8).clone()
    position, bit = draw.draw(some.integers(0, 4 * size - 1)), draw.draw(some.integers(0, 7))
    before = digest(content.view(torch.float32))
    content[position] ^= 1 << bit
    assert digest(content.view(torch.float32)) != before
    content[position] ^= 1 << bit
    assert digest(content.view(torch.float32)) == before
