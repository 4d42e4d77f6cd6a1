"""Balancing under the engine: which tokens are counted, how often, on which ranks, and when the bias is updated."""

import dataclasses
from pathlib import Path

import pytest
import torch

from dist_moe.comm.mesh import Mesh
from dist_moe.policies.loss_free import loss_free_update
from tests.dist.balanced import (
    CPU,
    biases_in_bf16,
    evaluate,
    evaluations,
    gradients,
    half_of_padding,
    layers_of_many_sizes,
    steps_with_evaluation,
    validation_set,
    whole_run,
)
from tests.dist.pool import RankPool
from tests.dist.small import DEEPSEEK, Case, Trace, make_task, ragged_batch, run_case

ALONE = Mesh(world_size=1, rank=0, expert_parallel=1)


def same_biases(one: Trace, other: Trace) -> bool:
    """Bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(one.biases, other.biases, strict=True))


@pytest.fixture(scope="module")
def four(ranks: RankPool) -> list[Trace]:
    """Two steps on four ranks, each with rows of its own."""
    return ranks.run(run_case, 4, Case(expert_parallel=2, steps=2))


@pytest.fixture(scope="module")
def one(ranks: RankPool) -> Trace:
    """The same two steps on one rank."""
    (trace,) = ranks.run(run_case, 1, Case(steps=2))
    return trace


@pytest.mark.slow
def test_trap_T01_recomputation_counts_once(ranks: RankPool) -> None:
    plain = Case(expert_parallel=2, accumulation=2, steps=2)
    wanted = ranks.run(run_case, 2, plain)
    found = ranks.run(run_case, 2, dataclasses.replace(plain, checkpointing=True))
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.loads == theirs.loads
        assert ours.losses == theirs.losses
        assert same_biases(ours, theirs)


def test_trap_T02_recomputation_selects_the_same_experts() -> None:
    """With biases that change the selection, and with padding, which recomputation has to mask again."""
    generator = torch.Generator().manual_seed(0)
    biases = [0.2 * torch.randn(12, generator=generator) for _ in range(2)]
    wanted, loads, calls = gradients(checkpointing=False, biases=biases)
    found, loads_again, calls_again = gradients(checkpointing=True, biases=biases)
    assert (calls, calls_again) == (2, 4), "the second model does recompute"
    assert all(torch.equal(a, b) for a, b in zip(loads_again, loads, strict=True))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_trap_T03_evaluation_between_steps_moves_nothing(ranks: RankPool) -> None:
    evaluated = ranks.run(steps_with_evaluation, 2, True)
    plain = ranks.run(steps_with_evaluation, 2, False)
    for (biases, loads), (plain_biases, plain_loads) in zip(evaluated, plain, strict=True):
        assert loads == plain_loads
        assert all(torch.equal(a, b) for a, b in zip(biases, plain_biases, strict=True))


def test_trap_T06_the_counts_are_those_of_all_ranks(four: list[Trace], one: Trace) -> None:
    tokens = int((ragged_batch().documents_BS >= 0).sum())
    assert [sum(load) for load in four[0].loads[0]] == [2 * tokens] * 2, "each token twice, padding never"
    assert all(trace.loads[0] == one.loads[0] for trace in four)


def test_trap_T08_every_layer_is_updated_and_named(ranks: RankPool, tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / f"text-{number}.txt").write_text(f"{number} to be, or not to be: that is the question\n" * 20)
    printed, metrics = ranks.run(whole_run, 2, str(tmp_path))[0]
    assert "balancing policy loss_free on layers model.layers.1.mlp, model.layers.2.mlp" in printed
    step = next(line for line in metrics if line.get("step") == 1)
    assert max(step["max_vio_per_layer"]) > 0 and len(step["max_vio_per_layer"]) == 2
    assert [layer["max"] > 0 > layer["min"] for layer in step["bias_per_layer"]] == [True, True]


@pytest.mark.parametrize(("workers", "accumulation"), [(1, 4), (2, 4)])
def test_trap_T09_accumulation_gives_the_bias_of_one_large_batch(
    ranks: RankPool, workers: int, accumulation: int
) -> None:
    """Without a learning rate, so that rounding cannot send a token elsewhere in a later step."""
    whole = Case(steps=3, learning_rate=0.0)
    (wanted,) = ranks.run(run_case, 1, whole)
    for found in ranks.run(run_case, workers, dataclasses.replace(whole, accumulation=accumulation)):
        assert found.loads == wanted.loads
        assert same_biases(found, wanted)


def test_trap_T10_the_bias_is_equal_on_all_ranks(four: list[Trace]) -> None:
    assert all(bias.any() for bias in four[0].biases)
    assert all(same_biases(trace, four[0]) for trace in four)


def test_trap_T12_the_bias_stays_fp32_in_the_engine_and_on_disk(ranks: RankPool, tmp_path: Path) -> None:
    for after_step, after_load in ranks.run(biases_in_bf16, 2, str(tmp_path / "model")):
        for bias_E in [*after_step, *after_load]:
            assert bias_E.dtype == torch.float32
            moved = set((bias_E - 0.5).abs().mul(1e4).round().tolist())  # 0: an expert that has just its share
            assert 10.0 in moved and moved <= {0.0, 10.0}, "0.5 + 0.001 is 0.5 in bf16"
        assert all(torch.equal(a, b) for a, b in zip(after_load, after_step, strict=True))


@pytest.mark.parametrize("stage", [0, 1])
def test_trap_T13_a_skipped_step_does_not_change_the_bias(ranks: RankPool, stage: int) -> None:
    case = Case(expert_parallel=2, zero_stage=stage, poison="loss", steps=2)
    for trace in ranks.run(run_case, 2, case):
        assert trace.taken == [False, True]
        second = [loss_free_update(torch.zeros(12), torch.tensor(load), 0.01) for load in trace.loads[1]]
        assert all(torch.equal(a, b) for a, b in zip(trace.biases, second, strict=True))


def test_trap_T14_an_evaluated_model_keeps_its_bias() -> None:
    task = make_task(Case(), ALONE)
    for layer in task.layers:
        layer.router.selection_bias.copy_(torch.arange(12) * 0.01)
    was_training = task.training
    evaluate(task, validation_set(rows=5), ALONE, CPU, 1)
    assert all(torch.equal(layer.router.selection_bias, torch.arange(12) * 0.01) for layer in task.layers)
    assert task.training == was_training


@pytest.mark.parametrize("policy", ["loss_free", "none"])
def test_trap_T15_layers_of_different_sizes_share_one_collective(ranks: RankPool, policy: str) -> None:
    still = policy == "none"
    for loads, biases, collectives in ranks.run(layers_of_many_sizes, 2, policy):
        assert loads == [[0, 3], [0, 3, 6, 9, 12], [0, 3, 6]]
        signs = [[1, -1], [1, 1, 0, -1, -1], [1, 0, -1]]
        assert biases == [[0.0 if still else 0.5 * sign for sign in layer] for layer in signs]
        assert collectives == 1


def test_trap_T28_a_rank_with_only_padding_takes_part(ranks: RankPool) -> None:
    ((loss, norm, loads, biases),) = ranks.run(half_of_padding, 1)
    shares = ranks.run(half_of_padding, 2)
    assert shares[1][0] == 0.0
    assert sum(share[0] for share in shares) == pytest.approx(loss, rel=1e-5)
    for _, norm_there, loads_there, biases_there in shares:
        assert norm_there == pytest.approx(norm, rel=1e-4)
        assert loads_there == loads
        assert all(torch.equal(a, b) for a, b in zip(biases_there, biases, strict=True))


@pytest.mark.parametrize(("workers", "expert_parallel"), [(2, 1), (2, 2), (4, 4)])
def test_trap_T30_an_uneven_last_batch_of_the_evaluation(ranks: RankPool, workers: int, expert_parallel: int) -> None:
    """Ranks without rows take part; the last row of the text is padded, and there are more rows than the limit."""
    rows = [1, 7, 9]
    task = make_task(Case(), ALONE)
    wanted = [evaluate(task, validation_set(count), ALONE, CPU, 1).as_dict() for count in rows]
    for found in ranks.run(evaluations, workers, expert_parallel, rows, timeout_s=60):
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours["validation_loss"] == pytest.approx(theirs["validation_loss"], rel=1e-6)
            for key in ("tokens", "bytes", "load", "experts_per_token_histogram"):
                assert ours[key] == theirs[key]
    assert sum(wanted[1]["load"][0]) == 7 * 24 * DEEPSEEK["num_experts_per_tok"]
