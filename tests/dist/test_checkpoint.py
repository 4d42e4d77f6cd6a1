"""Runs that stop and go on are the run that never stopped: bit for bit on one layout, to rounding on another."""

from pathlib import Path

import pytest

from tests.dist.pool import RankPool
from tests.dist.resumable import same_bits, steps, train, write_text

POLICIES = ("balance.policy=none", "balance.policy=loss_free")
KINDS = {
    "fp32, ZeRO 1, accumulated": ("parallel.zero_stage=1", "train.micro_batch=2"),
    "fp32, ZeRO 2": ("parallel.zero_stage=2",),
    "fp32, ZeRO 0": ("parallel.zero_stage=0",),
    "bf16, ZeRO 0": ("parallel.zero_stage=0", "train.precision=bf16"),
    "bf16, ZeRO 1": ("train.precision=bf16",),
    "bf16, ZeRO 2, recomputed": (
        "parallel.zero_stage=2",
        "train.precision=bf16",
        "train.activation_checkpointing=true",
    ),
    "sgd with momentum": ("train.optimizer=sgd", "train.momentum=0.9", "train.learning_rate=0.1"),
    "dropout": ("model.config.attention_dropout=0.2",),
    "threshold, adaptive weights, budget": (
        "router.selection=threshold",
        "router.budget=3.0",
        "balance.policy=adaptive_weight",
        "balance.rate=0.05",
    ),
    "quantile": ("balance.policy=quantile",),
    "no balance": ("balance.policy=none",),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize("kind", KINDS)
def test_trap_T44_ten_steps_are_five_and_five_more_bit_for_bit(
    ranks: RankPool, text: Path, tmp_path: Path, kind: str
) -> None:
    """Every tensor of the last checkpoint (weights, masters, moments, biases, random states), and every loss."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ranks.run(train, 2, text, whole, (*KINDS[kind], "train.steps=10"))
    for until in (5, 10):
        ranks.run(train, 2, text, parts, (*KINDS[kind], f"train.steps={until}", "train.schedule_steps=20"))
    last = "checkpoints/step-000010"
    assert same_bits(whole / last, parts / last) == []
    assert (whole / last / "state/training.json").read_text() == (parts / last / "state/training.json").read_text()
    ours, theirs = steps(whole), steps(parts)
    assert list(ours) == list(theirs) == list(range(1, 11))
    for field in ("loss", "grad_norm", "load", "learning_rate"):
        assert [step[field] for step in ours.values()] == [step[field] for step in theirs.values()], field
