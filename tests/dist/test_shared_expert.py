"""A shared expert on two ranks: it runs while rows are exchanged, forward and backward, and once."""

import weakref
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dist_moe.comm.exchange import RowsExchange
from dist_moe.comm.mesh import make_mesh
from dist_moe.model.build import build_model
from dist_moe.model.convert import find_layers
from dist_moe.model.early_call import EarlyCall
from tests.dist.pool import RankPool
from tests.dist.small import DEEPSEEK, VOCABULARY

ROWS_OUT = ["begin", "shared expert", "end"]
ROWS_BACK = ["begin", "end"]


def order_of_events(rank: int, world_size: int) -> list[str]:
    """What begins and ends in the forward and backward of a model with one MoE layer."""
    model = build_model("deepseek_v3", {**DEEPSEEK, "num_hidden_layers": 2}, "sigmoid", make_mesh(world_size), seed=0)
    model.gradient_checkpointing_disable()
    (shared,) = (module for name, module in model.named_modules() if name.endswith("shared_experts"))
    down = shared.get_submodule("down_proj")
    events: list[str] = []
    begin, end = RowsExchange.begin, RowsExchange.end

    def recorded(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            events.append(name)
            return function(*args)

        return call

    down.register_forward_hook(lambda *_: events.append("shared expert"))
    down.register_full_backward_hook(lambda *_: events.append("shared expert"))
    tokens_BS = torch.randint(1, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(rank))
    with (
        mock.patch.object(RowsExchange, "begin", recorded("begin", begin)),
        mock.patch.object(RowsExchange, "end", recorded("end", end)),
    ):
        model(input_ids=tokens_BS).logits.sum().backward()
    return events


def test_trap_T52_a_shared_expert_runs_once_beside_the_exchange_in_both_directions(ranks: RankPool) -> None:
    forward, backward = [*ROWS_OUT, *ROWS_BACK], [*ROWS_BACK, *ROWS_OUT]
    assert ranks.run(order_of_events, 2) == [forward + backward] * 2


def results_kept(rank: int, world_size: int) -> int:
    """The number of results of shared experts that are kept after a backward with activation checkpointing."""
    model = build_model("deepseek_v3", DEEPSEEK, "sigmoid", make_mesh(world_size), seed=0)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    started = []
    start = EarlyCall.start

    def recorded(early: EarlyCall, hidden_TD: Tensor) -> None:
        start(early, hidden_TD)
        assert early._started is not None
        started.append(weakref.ref(early._started[1]))

    tokens_BS = torch.randint(1, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(rank))
    with mock.patch.object(EarlyCall, "start", recorded):
        model(input_ids=tokens_BS, use_cache=False).logits.sum().backward()
    layers = len(find_layers(model))
    assert len(started) == 2 * layers and layers > 1, "in the forward and in its recomputation"
    return sum(result() is not None for result in started)


def test_trap_T36_recomputation_keeps_no_result_of_a_shared_expert(ranks: RankPool) -> None:
    assert ranks.run(results_kept, 2) == [0, 0]


def no_tokens(rank: int, world_size: int) -> list[tuple[int, ...]]:
    """Shapes of the result and of the gradient of a block on ranks of which the second has no tokens."""
    model = build_model("deepseek_v3", DEEPSEEK, "sigmoid", make_mesh(world_size), seed=0)
    block = model.get_submodule(find_layers(model)[0].name)
    hidden_BSD = torch.randn(1, 5 * (1 - rank), DEEPSEEK["hidden_size"], requires_grad=True)
    mixed_BSD = block(hidden_BSD)
    mixed_BSD.sum().backward()
    assert hidden_BSD.grad is not None
    return [tuple(mixed_BSD.shape), tuple(hidden_BSD.grad.shape)]


def test_trap_T28_a_rank_without_tokens_has_no_rows_of_a_shared_expert(ranks: RankPool) -> None:
    width = DEEPSEEK["hidden_size"]
    assert ranks.run(no_tokens, 2) == [[(1, 5, width)] * 2, [(1, 0, width)] * 2]
