"""A shared expert on two ranks: it runs while rows are exchanged, forward and backward, and once."""

from typing import Any
from unittest import mock

import torch

from dist_moe.comm.exchange import RowsExchange
from dist_moe.comm.mesh import make_mesh
from dist_moe.model.build import build_model
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
