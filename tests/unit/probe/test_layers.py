"""The MoE layers of a model: its experts, the routers next to them, and the module whose forward is counted."""

import pytest
import torch
from torch import nn

from dist_moe.errors import UserError
from dist_moe.probe.layers import counted_in, find_layers
from tests.attached import EXPERTS, FAMILIES, make_model

BLOCKS = {"granitemoe": "block_sparse_moe", "afmoe": "mlp", "jamba": "feed_forward", "llama4_text": "feed_forward"}
DENSE = {"ernie4_5_moe": 1, "afmoe": 1, "deepseek_v3": 1, "deepseek_v2": 1}
"""Leading layers without experts."""


class ManyExperts(nn.Module):
    """Experts by their name and their stacked weights."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))


class Block(nn.Module):
    """A block with the children that are given."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_moe_layer_is_found_with_its_router_and_experts(family: str) -> None:
    model = make_model(family)
    layers = find_layers(model)
    first, block = DENSE.get(family, 0), BLOCKS.get(family, "mlp")
    assert [layer.name for layer in layers] == [f"model.layers.{place}.{block}" for place in (first, first + 1)]
    for layer in layers:
        assert model.get_submodule(layer.name) is layer.block
        assert {layer.router, layer.experts} <= set(layer.block.children())
        assert any(each.ndim == 3 and len(each) == EXPERTS for each in layer.experts.parameters(recurse=False))
        assert any(each.ndim == 2 and len(each) == EXPERTS for each in layer.router.parameters())


def test_the_three_marks_of_experts() -> None:
    marked, by_deepspeed = nn.Identity(), nn.Identity()
    vars(marked).update(has_gate=True, is_transposed=False)
    autoep = Block(router=nn.Linear(2, 2), experts=by_deepspeed)
    vars(autoep)["_is_autoep_layer"] = True
    model = Block(
        a=Block(gate=nn.Linear(2, 2), experts=marked),
        b=autoep,
        c=Block(classifier=nn.Linear(2, 2), experts=ManyExperts(3, 2, 2)),
        d=Block(gate=nn.Linear(2, 2), experts=ManyExperts(3, 2)),
        e=Block(gate=nn.Linear(2, 2), experts=nn.Identity()),
    )
    assert [layer.name for layer in find_layers(model)] == ["a", "b", "c"]


def test_experts_that_zero_3_has_partitioned_are_found() -> None:
    experts = ManyExperts(0)
    vars(experts.weight)["ds_shape"] = torch.Size([3, 2, 2])
    assert len(find_layers(Block(mlp=Block(gate=nn.Linear(2, 2), experts=experts)))) == 1


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"Sequential has no MoE layer \(no module with stacked experts\); give a model"
    ):
        find_layers(nn.Sequential(nn.Linear(2, 2)))


def test_experts_in_a_wrapper_belong_to_the_block_with_the_router() -> None:
    wrapped = Block(base_layer=ManyExperts(3, 2, 2))
    model = Block(mlp=Block(gate=nn.Linear(2, 3), experts=wrapped))
    (layer,) = find_layers(model)
    assert (layer.name, layer.experts) == ("mlp", wrapped.base_layer)


def test_experts_without_a_router_are_refused() -> None:
    model = Block(mlp=Block(select=nn.Linear(2, 2), experts=ManyExperts(3, 2, 2)))
    with pytest.raises(UserError, match=r"mlp\.experts has no router next to it \(a child named gate, router or"):
        find_layers(model)


def test_trap_T94_what_is_counted_surrounds_the_layers_and_is_never_recomputed() -> None:
    """Neither a list of layers nor an element of one, which activation checkpointing computes again."""
    stack = nn.ModuleList(Block(mlp=nn.Identity(), other=nn.Identity()) for _ in range(3))
    model = Block(
        model=Block(layers=stack),
        encoder=Block(one=Block(mlp=nn.Identity()), two=Block(mlp=nn.Identity())),
        chain=nn.Sequential(Block(mlp=nn.Identity())),
        named=nn.ModuleDict({"a": Block(mlp=nn.Identity())}),
    )
    assert counted_in(model, ["model.layers.0.mlp", "model.layers.2.mlp"]) == "model"
    assert counted_in(model, ["model.layers.1.mlp"]) == "model"
    assert counted_in(model, ["model.layers.1.mlp", "model.layers.1.other"]) == "model"
    assert counted_in(model, ["encoder.one.mlp", "encoder.two.mlp"]) == "encoder"
    assert counted_in(model, ["encoder.one.mlp"]) == "encoder.one"
    assert counted_in(model, ["model.layers.0.mlp", "encoder.one.mlp"]) == ""
    assert counted_in(model, ["chain.0.mlp"]) == counted_in(model, ["named.a.mlp"]) == ""
