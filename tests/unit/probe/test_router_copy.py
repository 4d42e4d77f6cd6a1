"""The copy of a router that is called in its place: it has the router's rule, and the router keeps all that it has."""

from typing import NoReturn

import pytest
import torch
from torch import Tensor, nn

from dist_moe.errors import UserError
from dist_moe.probe.layers import FoundLayer, find_layers
from dist_moe.probe.own_bias import find_own_bias
from dist_moe.probe.router_copy import TOKENS, RouterCopy
from tests.attached import EXPERTS, make_model, tensors_of


class Hashed(nn.Module):
    """A router that needs the token ids too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(EXPERTS, 4))

    def forward(self, hidden_TD: Tensor, input_ids: Tensor, scale: float = 1.0) -> Tensor:
        return hidden_TD @ self.weight.T


def last_layer(family: str) -> FoundLayer:
    return find_layers(make_model(family))[-1]


def copy_of(layer: FoundLayer) -> RouterCopy:
    return RouterCopy(layer.router, find_own_bias(layer))


def never(*args: object) -> NoReturn:
    raise AssertionError("the model's own router was called")


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "ernie4_5_moe", "afmoe"])
def test_the_router_is_never_called_and_keeps_all_that_it_has(family: str) -> None:
    layer = last_layer(family)
    for module in layer.router.modules():
        module.register_forward_hook(never)
        module.register_forward_pre_hook(never)
        vars(module)["forward"] = never
    before = {name: value.clone() for name, value in tensors_of(layer.block)}
    drawn = torch.get_rng_state()
    copy = copy_of(layer)
    for bias_E in (torch.zeros(1), torch.randn(EXPERTS, generator=torch.Generator().manual_seed(0))):
        copy.call(bias_E)
    assert torch.equal(torch.get_rng_state(), drawn), "random numbers of the user's run"
    after = dict(tensors_of(layer.block))
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert all(each.grad is None for each in layer.router.parameters())


@pytest.mark.parametrize("place", ["meta", "bf16", "partitioned"])
def test_trap_T99_a_copy_is_of_full_size_in_fp32_on_the_cpu(place: str) -> None:
    """Its results have the same bits for a model on any device and in any precision."""
    wanted = copy_of(last_layer("deepseek_v3")).call(torch.zeros(1))
    layer = last_layer("deepseek_v3")
    if place == "meta":
        layer.block.to("meta")
    elif place == "bf16":
        layer.block.bfloat16()
    else:
        weight = layer.router.get_parameter("weight")
        weight.ds_shape = weight.shape  # type: ignore[attr-defined]
        weight.data = torch.empty(0)
    found = copy_of(layer).call(torch.zeros(1))
    for ours, theirs in zip(found.returned, wanted.returned, strict=True):
        assert ours.device.type == "cpu" and ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("family", ["deepseek_v3", "minimax_m2", "afmoe"])
def test_a_bias_enters_the_call_from_the_router_or_from_the_block(family: str) -> None:
    bias_E = torch.linspace(-2, 2, EXPERTS)
    logits_TE, _, ids_TK = copy_of(last_layer(family)).call(bias_E).returned
    assert len(logits_TE) == TOKENS and logits_TE.std() > 1
    wanted = (logits_TE.sigmoid() + bias_E).topk(2, dim=1).indices
    assert torch.equal(ids_TK.sort(dim=1).values, wanted.sort(dim=1).values)
    without = logits_TE.topk(2, dim=1).indices
    assert not torch.equal(ids_TK.sort(dim=1).values, without.sort(dim=1).values)


def test_the_logits_of_a_child_are_kept() -> None:
    call = copy_of(last_layer("afmoe")).call(torch.zeros(1))
    assert call.gate_logits is not None
    torch.testing.assert_close(call.gate_logits.reshape(TOKENS, EXPERTS), call.returned[0])
    assert copy_of(last_layer("deepseek_v3")).call(torch.zeros(1)).gate_logits is None


def test_gradients_reach_the_tokens_of_a_call() -> None:
    call = copy_of(last_layer("qwen3_moe")).call(None)
    (gradient_TD,) = torch.autograd.grad(call.returned[1].square().sum(), call.hidden_TD)
    assert bool(gradient_TD.any(dim=1).all())


def test_a_router_that_needs_more_than_the_hidden_states_is_refused() -> None:
    with pytest.raises(UserError, match=r"^the router is called with input_ids besides the hidden states$"):
        RouterCopy(Hashed(), None).call(None)


def test_a_router_without_a_matrix_is_refused() -> None:
    with pytest.raises(UserError, match="the router has no matrix"):
        RouterCopy(nn.LayerNorm(4), None)
