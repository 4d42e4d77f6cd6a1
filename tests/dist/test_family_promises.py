"""One family of each group: the same losses on any layout, exact counts, and resumed runs that equal whole ones."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.dist.family_runs import (
    CLIPPING,
    LENGTH,
    SEQUENCES,
    STEPS,
    find_seed,
    last_checkpoint,
    overrides_of,
    read_steps,
    trace_of,
    train_and_evaluate,
)
from tests.dist.pool import RankPool
from tests.dist.resumable import same_bits, write_text
from tests.families.small import TOP_K
from tests.parity.trace import compare
from tests.parity.train import train_worker
from tests.selection import full

FAMILIES = {
    "gpt_oss": 0,
    "jamba": 0,
    "olmoe": 0,
    "nemotron_h": 0,
    "glm5_next": 0,
    "granitemoe": 0,
    "lfm2_moe": 0,
    "minimax_m2": 0,
    "ernie4_5_moe": 1,
    "gemma4": 2,
}
"""Of each group of adapters at least one -> the first seed to try."""
QUICK = ("gpt_oss", "jamba")
LAYOUTS = {  # workers, overrides
    "two expert-parallel": (2, ("parallel.expert_parallel=2", "train.micro_batch_size=4")),
    "two data-parallel": (2, ("parallel.expert_parallel=1", "train.micro_batch_size=4", "parallel.zero_stage=2")),
    "accumulated": (1, ("train.micro_batch_size=2",)),
    "both": (2, ("parallel.expert_parallel=2", "train.micro_batch_size=1")),
}
RunOf = Callable[[str, str], Path]
SeedOf = Callable[[str], int]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def seed_of(ranks: RankPool, text: Path, folder: Path) -> SeedOf:
    """The seed of a family's runs; the run on one worker is then in `folder`."""
    return cache(lambda family: find_seed(ranks, family, text, folder / family / "alone", FAMILIES[family]))


@pytest.fixture(scope="module")
def run_of(ranks: RankPool, text: Path, folder: Path, seed_of: SeedOf) -> RunOf:
    """`run_of(family, layout)`: the folder of a whole run, made once."""

    @cache
    def train(family: str, layout: str) -> Path:
        workers, further = LAYOUTS[layout]
        path = folder / family / layout.replace(" ", "-")
        ranks.run(train_worker, workers, overrides_of(family, text, path, seed_of(family), further))
        return path

    return train


each_family = pytest.mark.parametrize("family", [name if name in QUICK else full(name) for name in FAMILIES])


@pytest.mark.slow
@each_family
def test_losses_norms_loads_and_biases_are_those_of_one_worker(
    folder: Path, seed_of: SeedOf, run_of: RunOf, family: str
) -> None:
    seed_of(family)
    alone = trace_of(folder / family / "alone")
    for layout in LAYOUTS:
        difference = compare(trace_of(run_of(family, layout)), alone, CLIPPING)
        assert not difference.faults(), f"{layout}: {difference}"


@pytest.mark.slow
@each_family
def test_a_resumed_run_equals_the_whole_one(
    ranks: RankPool, text: Path, tmp_path: Path, seed_of: SeedOf, run_of: RunOf, family: str
) -> None:
    """On the same layout bit for bit, in every tensor of the last checkpoint; on another one within the tolerance."""
    whole, parts, other = run_of(family, "both"), tmp_path / "parts", tmp_path / "other"
    workers, further = LAYOUTS["both"]
    for steps in (STEPS // 2, STEPS):
        overrides = overrides_of(family, text, parts, seed_of(family), (*further, f"train.steps={steps}"))
        ranks.run(train_worker, workers, overrides)
    assert same_bits(last_checkpoint(whole), last_checkpoint(parts)) == []
    assert trace_of(parts).unequal(trace_of(whole)) == []

    half = parts / "checkpoints" / f"step-{STEPS // 2:06d}"
    alone = (f"train.micro_batch_size={SEQUENCES}", f"checkpoint.resume={half}")
    ranks.run(train_worker, 1, overrides_of(family, text, other, seed_of(family), alone))
    ours, theirs = read_steps(other), read_steps(whole)[STEPS // 2 :]
    assert [step["step"] for step in ours] == list(range(STEPS // 2 + 1, STEPS + 1))
    for one, another in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(another["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(another["grad_norm"], rel=1e-3)
        assert one["learning_rate"] == another["learning_rate"]
    assert ours[0]["load"] == theirs[0]["load"], "the bias and the order of the text are restored"


@pytest.mark.slow
@each_family
def test_recomputation_and_evaluations_change_no_count(
    ranks: RankPool, text: Path, tmp_path: Path, seed_of: SeedOf, run_of: RunOf, family: str
) -> None:
    """With accumulation: every assignment of every token once, and the same losses bit for bit."""
    workers, further = LAYOUTS["both"]
    recomputed = (*further, "train.activation_checkpointing=true")
    overrides = overrides_of(family, text, tmp_path, seed_of(family), recomputed)
    assert ranks.run(train_and_evaluate, workers, overrides) == [STEPS] * workers
    whole, ours = read_steps(run_of(family, "both")), read_steps(tmp_path)
    for field in ("loss", "grad_norm", "load", "bias_per_layer"):
        assert [step[field] for step in ours] == [step[field] for step in whole], field
    assert {sum(layer) for step in ours for layer in step["load"]} == {SEQUENCES * LENGTH * TOP_K}
    assert [step["tokens"] for step in ours] == [SEQUENCES * LENGTH * number for number in range(1, STEPS + 1)]
