"""Dispatch over real ranks: against the slow twin, with empty ranks and experts, and how often it communicates."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_moe.comm.mesh import make_mesh
from dist_moe.moe.dispatch import combine, dispatch
from dist_moe.moe.select import TopK
from tests.collectives import counted
from tests.dist.layers import assert_close, bytes_between_hosts, check_against_twin, fast_pass, host_reads
from tests.dist.pool import RankPool
from tests.layer_operators import MOST_OPERATORS, layer_operators
from tests.selection import full
from tests.twin import LayerCase, Pass, slow_pass


@st.composite
def layer_cases(draw: st.DrawFn, workers: int, expert_parallel: int, per_node: int) -> LayerCase:
    """Random sizes: experts and ranks without tokens, skew, and padding among them."""
    experts = expert_parallel * draw(st.integers(1, 4))
    top_k = draw(st.integers(1, min(4, experts)))
    used_experts = draw(st.sets(st.integers(0, experts - 1), min_size=top_k))
    return LayerCase(
        expert_parallel=expert_parallel,
        tokens=tuple(draw(st.lists(st.integers(0, 9), min_size=workers, max_size=workers))),
        experts=experts,
        top_k=top_k,
        used_experts=draw(st.sampled_from([None, tuple(sorted(used_experts))])),
        ragged=draw(st.booleans()),
        padding=draw(st.sampled_from([0.0, 0.3, 1.0])),
        zipf_exponent=draw(st.sampled_from([0.0, 2.0, 6.0])),
        width=draw(st.sampled_from([4, 5, 8])),
        expert_width=draw(st.sampled_from([3, 4])),
        dtype=draw(st.sampled_from([torch.bfloat16, torch.float32, torch.float64])),
        on_device=draw(st.booleans()),
        shared_memory=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
        ranks_per_node=per_node,
    )


@pytest.mark.parametrize(
    ("workers", "expert_parallel", "per_node"),
    [
        *[(1, 1, 0), (2, 2, 0), (4, 2, 1), (4, 4, 2)],
        *[full(2, 1, 0), full(4, 2, 0), full(4, 4, 0), full(2, 2, 1), full(4, 4, 1)],
    ],
)
def test_a_layer_equals_its_slow_twin(ranks: RankPool, workers: int, expert_parallel: int, per_node: int) -> None:
    """per_node: ranks per host of hierarchical dispatch; 0 is flat dispatch."""

    @settings(max_examples=5, deadline=None)
    @given(st.lists(layer_cases(workers, expert_parallel, per_node), min_size=6, max_size=12))
    def check(cases: list[LayerCase]) -> None:
        check_against_twin(ranks, cases)

    check()


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Pass) if field.name != "held"])
def test_the_comparison_in_bf16_sees_a_row_that_is_off_by_a_tenth(name: str) -> None:
    case = LayerCase(1, (200,), 4, 2, dtype=torch.bfloat16)
    wanted = slow_pass(case, [0])
    rounded = {field.name: getattr(wanted, field.name) for field in dataclasses.fields(Pass)}
    rounded |= {key: value.bfloat16() for key, value in rounded.items() if key != "held"}
    assert_close(Pass(**rounded), wanted, case.dtype)
    wrong = rounded[name].clone()
    wrong.flatten(0, -2)[-1] *= 1.1
    with pytest.raises(AssertionError, match=name):
        assert_close(Pass(**{**rounded, name: wrong}), wanted, case.dtype)


EMPTY = {
    "an expert receives nothing": LayerCase(2, (5, 6), 4, 2, used_experts=(0, 1, 2)),
    "a rank receives nothing": LayerCase(2, (5, 6), 4, 2, used_experts=(0, 1)),
    "one rank receives everything of three others": LayerCase(4, (5, 6, 7, 3), 8, 1, used_experts=(5,)),
    "a rank has no tokens": LayerCase(4, (5, 0, 7, 3), 8, 2),
    "a rank has no tokens, and none are sent to it": LayerCase(2, (4, 0), 4, 2, used_experts=(0, 1)),
    "every token is padding": LayerCase(4, (5, 6, 7, 3), 8, 2, padding=1.0),
    "no rank has a token": LayerCase(2, (0, 0), 4, 2),
    "alone, and without a token": LayerCase(1, (0,), 4, 2),
}


@pytest.mark.parametrize("name", EMPTY)
def test_trap_T28_experts_and_ranks_that_receive_nothing(ranks: RankPool, name: str) -> None:
    case = EMPTY[name]
    hops = (0, 1) if case.expert_parallel > 1 else (0,)
    dtypes = (torch.float32, torch.float64)
    check_against_twin(
        ranks, [dataclasses.replace(case, dtype=dtype, ranks_per_node=hop) for dtype in dtypes for hop in hops]
    )


def test_hierarchical_dispatch_sends_a_row_once_per_host(ranks: RankPool) -> None:
    """Every token takes four experts of the second host: to it one row instead of four, and one gradient back."""
    case = LayerCase(4, (256, 256, 256, 256), 16, 4, used_experts=(8, 9, 14, 15), width=64)
    flat, hops = (
        ranks.run(bytes_between_hosts, 4, dataclasses.replace(case, ranks_per_node=per_node, shared_memory=False))
        for per_node in (0, 2)
    )
    row = 256 * 64 * 8  # of all tokens of a rank, in bytes
    # Rows to the second host and results back; gradients of results, and of rows back. Counts and weights are little,
    # and so is what fills the first message of a rank up that has no rows to send.
    assert [round(sent / row) for sent in flat] == [8, 8, 8, 8]
    assert [round(sent / row) for sent in hops] == [2, 2, 2, 2]


def test_trap_T33_prime_token_counts_that_differ_on_every_rank(ranks: RankPool) -> None:
    check_against_twin(ranks, [LayerCase(4, (7, 2, 13, 5), 12, 3, zipf_exponent=1.0)])


@pytest.mark.parametrize(("workers", "expert_parallel"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on_device", [False, True])
def test_trap_T27_uninitialized_memory_reaches_no_result(
    ranks: RankPool, workers: int, expert_parallel: int, dtype: torch.dtype, on_device: bool
) -> None:
    case = LayerCase(expert_parallel, (7, 5)[:workers], 4, 2, padding=0.5, dtype=dtype, on_device=on_device)
    assert (case.draw(0)[1] < 0).any(), "some slots stay empty"
    check_against_twin(ranks, [case], fill_with_nan=True)


@pytest.mark.parametrize(("workers", "expert_parallel", "reads"), [(1, 1, []), (2, 2, ["tolist"])])
def test_trap_T52_the_host_waits_for_a_device_once_and_only_to_exchange(
    ranks: RankPool, workers: int, expert_parallel: int, reads: list[str]
) -> None:
    """The numbers of rows that are sent and received; fp32, because other dtypes take a loop over the experts here."""
    case = LayerCase(expert_parallel, (7, 5)[:workers], 4, 2, padding=0.3, dtype=torch.float32, on_device=True)
    case = dataclasses.replace(case, shared_memory=False)
    assert ranks.run(host_reads, workers, case) == [reads] * workers


def test_a_layer_on_two_ranks_takes_few_operators(ranks: RankPool) -> None:
    for names in ranks.run(layer_operators, 2, TopK(2, "sigmoid", normalize=True)):
        assert len(names) <= MOST_OPERATORS, names


def multiply_by_expert(rank: int, world_size: int, case: LayerCase) -> list[torch.Tensor]:
    """Dispatch, multiply each row by the id of its expert, combine."""
    mesh = make_mesh(case.expert_parallel)
    hidden_TD, ids_TK, weights_TK, _ = case.draw(rank)
    there = dispatch(hidden_TD, ids_TK, weights_TK, case.experts, mesh)
    counts_e = there.ends_e.diff(prepend=torch.zeros(1, dtype=torch.int32))
    expert_of_row_Q = torch.tensor(mesh.local_experts(case.experts)).repeat_interleave(counts_e)
    results_QD = there.rows_QD * (expert_of_row_Q * there.weights_Q).unsqueeze(1)
    return [combine(results_QD, there.handle, mesh), hidden_TD, ids_TK, weights_TK]


@pytest.mark.parametrize(("workers", "expert_parallel"), [(1, 1), (2, 2), (4, 2), (4, 4)])
def test_trap_T36_with_expert_i_multiplying_by_i_the_output_is_known(
    ranks: RankPool, workers: int, expert_parallel: int
) -> None:
    case = LayerCase(expert_parallel, (5, 9, 6, 7)[:workers], 12, 3, padding=0.2)
    for mixed_TD, hidden_TD, ids_TK, weights_TK in ranks.run(multiply_by_expert, workers, case):
        factor_T = (weights_TK * ids_TK.clamp(min=0)).sum(dim=1)
        torch.testing.assert_close(mixed_TD, hidden_TD * factor_T.unsqueeze(1))


def test_between_hosts_rows_that_fit_the_first_message_need_no_second(ranks: RankPool) -> None:
    """Forward: rows with their ids and weights, four calls within the host, then results; backward all but counts."""
    few = LayerCase(4, (3, 0, 5, 2), 8, 2, ranks_per_node=2, shared_memory=False)
    many = dataclasses.replace(few, tokens=(3, 0, 999, 2))
    assert ranks.run(count_exchanges, 4, few) == [11, 11, 11, 11]
    assert ranks.run(count_exchanges, 4, many) == [12, 11, 12, 11], "ranks 0 and 2 have the same place on their hosts"
    check_against_twin(ranks, [many])


def count_exchanges(rank: int, world_size: int, case: LayerCase) -> int:
    """Count the all-to-all calls of one forward and backward."""
    with counted("all_to_all_single") as calls:
        fast_pass(rank, case)
    return len(calls)


def test_trap_T31_without_expert_parallelism_nothing_is_exchanged(ranks: RankPool) -> None:
    assert ranks.run(count_exchanges, 2, LayerCase(1, (5, 6), 4, 2)) == [0, 0]
    # Counts, rows, gate weights, results; and back the gradients of results, of rows and of weights.
    case = LayerCase(2, (5, 6), 4, 2)
    assert ranks.run(count_exchanges, 2, dataclasses.replace(case, shared_memory=False)) == [7, 7]
    # Through shared memory: whether it works, counts, and where the rows of each of four exchanges are.
    assert ranks.run(count_exchanges, 2, case) == [6, 6]
