"""Blocks that select the experts themselves (Jamba): the selection becomes the router's, and nothing else changes."""

import copy
from typing import Any

import pytest
import torch

from dist_moe.errors import UserError
from dist_moe.probe.block_selection import move_selection_to_routers
from dist_moe.probe.layers import find_layers
from dist_moe.probe.router_probe import probe_router
from tests.families.small import VOCABULARY, build, small_config

NO_GROUPS = (1, 1)


def test_a_model_with_moved_selection_computes_the_same() -> None:
    torch.manual_seed(0)
    model: Any = build(small_config("jamba"))
    moved = copy.deepcopy(model)
    move_selection_to_routers(moved)
    assert list(moved.state_dict()) == list(model.state_dict())
    tokens = torch.randint(VOCABULARY, (2, 16))
    losses = [each(input_ids=tokens, labels=tokens, use_cache=False).loss for each in (model, moved)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for (name, one), (_, other) in zip(model.named_parameters(), moved.named_parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None) and (one.grad is None or torch.equal(one.grad, other.grad)), (
            name
        )


def test_the_rule_of_the_router_is_found_then() -> None:
    with torch.device("meta"):
        model = build(small_config("jamba"))
    with pytest.raises(UserError, match="in which logits, gate weights and ids of experts cannot be identified"):
        probe_router(find_layers(model)[0], None, NO_GROUPS)
    move_selection_to_routers(model)
    rule = probe_router(find_layers(model)[0], None, NO_GROUPS).rule
    assert rule is not None
    assert (rule.score, rule.top_k, rule.normalize) == ("softmax", 2, False)


def test_blocks_of_other_kinds_stay_as_they_are() -> None:
    with torch.device("meta"):
        model = build(small_config("mixtral"))
    before = [type(module) for module in model.modules()]
    move_selection_to_routers(model)
    assert [type(module) for module in model.modules()] == before
