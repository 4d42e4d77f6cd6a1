"""`balance` on several ranks: the counts are those of all of them, and every rank has the same biases."""

from pathlib import Path

import pytest
import torch

from dist_moe.policies.loss_free import loss_free_update
from tests.attached import EXPERTS, added
from tests.dist.attached import (
    RATE,
    Trace,
    forwards,
    poisoned,
    sharded_by_fsdp,
    shared_tokens,
    trained_by_ddp,
    trained_by_deepspeed,
    unequal_layers,
    without_tokens,
)
from tests.dist.pool import RankPool


def same_biases(one: Trace, other: Trace) -> bool:
    """Bit for bit, in every step."""
    steps = zip(one.biases, other.biases, strict=True)
    return all(torch.equal(a, b) for first, second in steps for a, b in zip(first, second, strict=True))


def check_counts_and_biases(traces: list[Trace], start: float = 0.0) -> None:
    """The counts are the sums of what each rank's experts received, and the biases are moved by these."""
    for step, counts in enumerate(traces[0].counts):
        assert counts == added(*(trace.received[step] for trace in traces))
    for trace in traces:
        assert trace.counts == traces[0].counts and same_biases(trace, traces[0])
    bias_LE = [start * torch.arange(EXPERTS) for _ in traces[0].counts[0]]
    for counts, biases in zip(traces[0].counts, traces[0].biases, strict=True):
        bias_LE = [loss_free_update(b, torch.tensor(load), RATE) for b, load in zip(bias_LE, counts, strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(biases, bias_LE, strict=True))


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_two_ranks_balance_as_one_with_the_union_of_their_batches(ranks: RankPool, family: str) -> None:
    (alone,) = ranks.run(forwards, 1, family)
    both = ranks.run(forwards, 2, family)
    check_counts_and_biases(both)
    for trace in both:
        assert trace.counts == alone.counts and same_biases(trace, alone)
        assert len(trace.own) == (2 if family == "deepseek_v3" else 0)
        assert all(torch.equal(a, b) for a, b in zip(trace.own, alone.own, strict=True))
    assert both[0].received != both[1].received, "the ranks have different tokens"


@pytest.mark.parametrize("family", ["qwen3_moe", "ernie4_5_moe"])
def test_trap_T94_recomputation_under_ddp_counts_once(ranks: RankPool, family: str) -> None:
    traces = ranks.run(trained_by_ddp, 2, family)
    check_counts_and_biases(traces)
    assert all(sum(layer) == 2 * 2 * 2 * 24 for step in traces[0].counts for layer in step)
    for trace in traces:
        assert all(torch.equal(a, b) for a, b in zip(trace.own, traces[0].biases[-1], strict=False))


@pytest.mark.parametrize("start", [0.0, 0.125])
@pytest.mark.parametrize("world_size", [2, 3])
def test_trap_T95_a_bias_that_fsdp_has_sharded_is_read_and_written_whole(
    ranks: RankPool, world_size: int, start: float
) -> None:
    """8 experts on 3 ranks are 3, 3 and 2."""
    found = ranks.run(sharded_by_fsdp, world_size, "afmoe", start)
    traces = [trace for trace, _ in found]
    check_counts_and_biases(traces, start)
    assert [trace.shards for trace in traces] == [[size] * 2 for size in ([4, 4] if world_size == 2 else [3, 3, 2])]
    for trace, raised in found:
        assert len(trace.own) == 2
        assert all(torch.equal(a, b) for a, b in zip(trace.own, traces[0].biases[-1], strict=True))
        assert all(layer[3] == 24 for layer in raised), "the forward selects with the whole bias"


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "jamba", "llama4_text"])
def test_a_model_without_a_sharded_bias_under_fsdp(ranks: RankPool, family: str) -> None:
    found = ranks.run(sharded_by_fsdp, 2, family, 0.0)
    check_counts_and_biases([trace for trace, _ in found])
    assert all(layer[3] == 24 for _, raised in found for layer in raised)


def test_trap_T98_ranks_with_different_layers_are_refused_on_every_rank(ranks: RankPool) -> None:
    (refusal, _), (other_refusal, _) = found = ranks.run(unequal_layers, 2)
    assert refusal == other_refusal
    assert refusal == (
        "rank 1 of the group has 2 MoE layers (model.layers.0.mlp with 8 experts), and rank 0 1 (model.layers.0.mlp "
        "with 8 experts); give as group the ranks with the same layers, such as those of one pipeline stage"
    )
    assert [load for _, load in found] == [[2 * 12], [2 * 24] * 2], "with a group of its own each rank counts itself"


def test_a_step_needs_tokens_on_one_rank(ranks: RankPool) -> None:
    for nowhere, one_rank, load in ranks.run(without_tokens, 2):
        assert nowhere.startswith("no forward of the model in training mode was counted before this step; call model.t")
        assert (one_rank, load) == ("", [2 * 24] * 2)


@pytest.mark.parametrize("shape", [(2,), (2, 2)])
def test_trap_T98_ranks_of_tensor_parallelism_count_their_tokens_once(ranks: RankPool, shape: tuple[int, ...]) -> None:
    traces = ranks.run(shared_tokens, 2 * len(shape), shape, False)
    assert traces[0].received == traces[1].received, "both have the same tokens"
    for trace in traces:
        assert trace.counts == traces[0].counts and same_biases(trace, traces[0])
    check_counts_and_biases([trace._replace(counts=traces[0].counts) for trace in traces[:: shape[-1]]])


def test_a_group_that_is_given_is_counted_as_it_is(ranks: RankPool) -> None:
    traces = ranks.run(shared_tokens, 2, (2,), True)
    check_counts_and_biases(traces)
    assert all(sum(layer) == 2 * 2 * 24 for step in traces[0].counts for layer in step)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("family", ["qwen3_moe", "ernie4_5_moe"])
def test_trap_T96_a_checkpoint_of_deepspeed_has_the_state(
    ranks: RankPool, tmp_path: Path, family: str, stage: int
) -> None:
    found = ranks.run(trained_by_deepspeed, 2, family, stage, str(tmp_path))
    traces = [first for first, _ in found]
    for step, counts in enumerate(traces[0].counts):
        assert counts == added(*(trace.received[step] for trace in traces))
        assert all(sum(layer) == 2 * 2 * 2 * 24 for layer in counts)
    for first, again in found:
        assert first.counts == traces[0].counts and same_biases(first, traces[0])
        assert again.counts == first.counts[2:] and same_biases(again, first._replace(biases=first.biases[2:]))
        for trace in (first, again):
            assert len(trace.own) == (2 if family == "ernie4_5_moe" else 0)
            assert all(torch.equal(a, b) for a, b in zip(trace.own, trace.biases[-1], strict=False))


def test_trap_T95_a_bias_that_zero_3_has_partitioned_is_written_whole(ranks: RankPool, tmp_path: Path) -> None:
    for first, again in ranks.run(trained_by_deepspeed, 2, "ernie4_5_moe", 3, str(tmp_path)):
        for trace in (first, again):
            assert trace.shards == [4, 4] and len(trace.own) == 2
            assert all(torch.equal(a, b) for a, b in zip(trace.own, trace.biases[-1], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["jamba", "llama4_text"])
def test_blocks_that_do_a_part_of_the_routing_under_zero_3(ranks: RankPool, tmp_path: Path, family: str) -> None:
    """Their classes change after DeepSpeed has partitioned the parameters."""
    found = ranks.run(trained_by_deepspeed, 2, family, 3, str(tmp_path))
    traces = [first for first, _ in found]
    for step, counts in enumerate(traces[0].counts):
        assert counts == added(*(trace.received[step] for trace in traces))
    for first, again in found:
        assert first.counts == traces[0].counts and same_biases(first, traces[0])
        assert again.counts == first.counts[2:] and same_biases(again, first._replace(biases=first.biases[2:]))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_trap_T97_a_nan_on_one_rank_is_a_skipped_step_on_every_rank(ranks: RankPool, stage: int) -> None:
    assert ranks.run(poisoned, 2, stage) == [[True, False, True]] * 2 if stage else [[True, False, False]] * 2
