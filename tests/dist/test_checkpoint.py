"""A resumed run equals the uninterrupted run: bit for bit on the same layout, up to rounding on another."""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.dist.pool import RankPool
from tests.dist.resumable import elements, resave, same_bits, steps, tensors, train, train_and_read, write_text
from tests.selection import cross, only_first

LAYOUTS = {  # workers, expert parallel, ZeRO stage
    "1, 1, 1": (1, ("parallel.expert_parallel=1", "parallel.zero_stage=1")),
    "2, 2, 1": (2, ("parallel.expert_parallel=2", "parallel.zero_stage=1")),
    "4, 2, 2": (4, ("parallel.expert_parallel=2", "parallel.zero_stage=2")),
    "4, 4, 0": (4, ("parallel.expert_parallel=4", "parallel.zero_stage=0")),
}
Saved = Callable[[str, bool], Path]
BF16 = ("train.precision=bf16",)
KINDS = {
    "fp32, ZeRO 1, accumulated": ("parallel.zero_stage=1", "train.micro_batch_size=1"),
    "bf16, ZeRO 2, recomputed": (
        "parallel.zero_stage=2",
        "train.precision=bf16",
        "train.activation_checkpointing=true",
    ),
    "fp32, ZeRO 0": ("parallel.zero_stage=0",),
    "fp32, ZeRO 2": ("parallel.zero_stage=2",),
    "bf16, ZeRO 0": ("parallel.zero_stage=0", "train.precision=bf16"),
    "bf16, ZeRO 1": ("train.precision=bf16",),
    "sgd with momentum": ("train.optimizer=sgd", "train.momentum=0.9", "train.learning_rate=0.1"),
    "dropout": ("model.config.attention_dropout=0.2",),
    "threshold, adaptive weights, target": (
        "router.selection=threshold",
        "router.score=softmax",
        "router.target_experts_per_token=3.0",
        "balance.policy=adaptive_weight",
        "balance.rate=0.05",
    ),
    "quantile": ("balance.policy=quantile",),
    "momentum": ("balance.policy=momentum",),
    "expert thresholds": ("router.selection=expert_threshold", "balance.policy=expert_threshold"),
    "no balance": ("balance.policy=none",),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize("kind", only_first(list(KINDS), 2))
def test_trap_T44_ten_steps_equal_five_resumed_for_five_more_bit_for_bit(
    ranks: RankPool, text: Path, tmp_path: Path, kind: str
) -> None:
    """Every tensor of the last checkpoint (weights, masters, moments, biases, random states) and every loss."""
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


@pytest.fixture(scope="module")
def saved(ranks: RankPool, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """`saved(layout, bf16)`: a run with a checkpoint of step 5, made once; in fp32 with five more steps."""

    @functools.cache
    def save(layout: str, bf16: bool) -> Path:
        workers, changes = LAYOUTS[layout]
        folder = tmp_path_factory.mktemp("saved")
        run_overrides = ("checkpoint.interval=5", *(("train.steps=5", *BF16) if bf16 else ("train.steps=10",)))
        ranks.run(train, workers, text, folder, (*changes, *run_overrides))
        return folder

    return save


@cross(("source_layout", list(LAYOUTS)), ("target", list(reversed(LAYOUTS))), strength=1)
def test_a_checkpoint_of_any_layout_resumes_in_any_other(
    ranks: RankPool, text: Path, tmp_path: Path, saved: Saved, source_layout: str, target: str
) -> None:
    """Twelve experts (T42) with different weights (T41): the next five losses are those of the uninterrupted run."""
    workers, changes = LAYOUTS[target]
    source = saved(source_layout, False) / "checkpoints/step-000005"
    ranks.run(train, workers, text, tmp_path, (*changes, "train.steps=10", f"checkpoint.resume={source}"))
    ours, theirs = steps(tmp_path), steps(saved(source_layout, False))
    assert list(ours) == [6, 7, 8, 9, 10]
    for step, line in ours.items():
        assert line["loss"] == pytest.approx(theirs[step]["loss"], rel=1e-4)
        assert line["grad_norm"] == pytest.approx(theirs[step]["grad_norm"], rel=1e-3)
        assert line["learning_rate"] == theirs[step]["learning_rate"]
    assert ours[6]["load"] == theirs[6]["load"], "the bias and the order of the text are restored"


MEMORY = {
    "momentum": ("balance.policy=momentum",),
    "ema_quantile": ("balance.policy=ema_quantile",),
}


@pytest.mark.parametrize("kind", only_first(list(MEMORY)))
def test_trap_T44_the_memory_of_a_rule_is_restored_on_another_layout(
    ranks: RankPool, text: Path, tmp_path: Path, kind: str
) -> None:
    """Written by two workers with expert parallelism, read and written again by one: the same bits."""
    ranks.run(train, 2, text, tmp_path / "two", (*MEMORY[kind], "train.steps=3"))
    source = tmp_path / "two" / "checkpoints" / "step-000003"
    ranks.run(resave, 1, text, tmp_path / "one", source, (*MEMORY[kind], "train.steps=3"))
    found, wanted = (
        {name: value for name, value in tensors(folder).items() if "state/balance" in name}
        for folder in (tmp_path / "one" / "checkpoints" / "step-000003", source)
    )
    memory = [name for name in wanted if "memory." in name]
    assert len(memory) == 2 * (2 if kind == "ema_quantile" else 1) and all(wanted[name].any() for name in memory)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.slow
def test_a_checkpoint_without_memory_resumes_with_an_empty_one(ranks: RankPool, text: Path, tmp_path: Path) -> None:
    """One of another policy, as of a version without memories; a line of the log says so."""
    ranks.run(train, 1, text, tmp_path / "old", ("train.steps=2",))
    source = tmp_path / "old" / "checkpoints" / "step-000002"
    overrides = ("balance.policy=momentum", f"checkpoint.resume={source}", "train.steps=3")
    printed = ranks.run(train_and_read, 1, text, tmp_path / "new", overrides)[0]
    assert "the checkpoint lacks the memory of balance.policy=momentum (momentum): it is empty" in " ".join(
        printed.split()
    )
    last = tensors(tmp_path / "new" / "checkpoints" / "step-000003")
    assert all(last[name].any() for name in last if "memory.momentum" in name)


@cross(
    ("source_layout, target", list(itertools.pairwise([*LAYOUTS, *LAYOUTS][:5]))), ("bf16", [False, True]), strength=1
)
def test_every_element_is_restored_in_any_layout(
    ranks: RankPool, text: Path, tmp_path: Path, saved: Saved, source_layout: str, target: str, bf16: bool
) -> None:
    """Saved in one layout, loaded and saved in another, weights, masters and moments have the same bits by name."""
    workers, changes = LAYOUTS[target]
    source = saved(source_layout, bf16) / "checkpoints/step-000005"
    ranks.run(resave, workers, text, tmp_path, source, (*changes, *(BF16 if bf16 else ())))
    before, after = elements(source), elements(tmp_path / "checkpoints/step-000005")
    kinds = {name.partition(":")[0] for name in before}
    assert kinds == {"model", "exp_avg", "exp_avg_sq", "step", *(["master"] if bf16 else [])}
    assert before.keys() == after.keys()
    assert [name for name, value in before.items() if value.tolist() != after[name].tolist()] == []


def test_master_weights_are_kept_when_the_precision_changes(
    ranks: RankPool, text: Path, tmp_path: Path, saved: Saved
) -> None:
    """From bf16 to fp32 the weights are the fp32 masters, not their bf16 roundings; and back."""
    source = saved("2, 2, 1", True) / "checkpoints/step-000005"
    ranks.run(resave, 2, text, tmp_path / "fp32", source, ())
    first, second = elements(source), elements(tmp_path / "fp32/checkpoints/step-000005")
    masters = {name.removeprefix("master:"): value for name, value in first.items() if name.startswith("master:")}
    assert masters and all(value.tolist() == second[f"model:{name}"].tolist() for name, value in masters.items())
    ranks.run(resave, 2, text, tmp_path / "bf16", tmp_path / "fp32/checkpoints/step-000005", BF16)
    third = elements(tmp_path / "bf16/checkpoints/step-000005")
    assert all(value.tolist() == third[f"master:{name}"].tolist() for name, value in masters.items())
