"""The selection bias that a model has of its own: where it is found, and how it is read and written."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_moe.probe.layers import FoundLayer, find_layers
from dist_moe.probe.own_bias import OwnBias, find_own_bias, full_shape
from tests.attached import EXPERTS, make_model

PLACES = {
    "deepseek_v3": ("gate.e_score_correction_bias", None),
    "ernie4_5_moe": ("gate.moe_statics.e_score_correction_bias", None),
    "minimax_m2": ("e_score_correction_bias", "e_score_correction_bias"),
    "afmoe": ("expert_bias", "expert_bias"),
}


class TakesBias(nn.Module):
    """A router to which its block gives a bias."""

    def forward(self, hidden_TD: Tensor, expert_bias: Tensor) -> Tensor:
        return hidden_TD + expert_bias


def layer_of(router: nn.Module, **attributes: Any) -> FoundLayer:
    block = nn.Module()
    for name, value in attributes.items():
        setattr(block, name, value)
    return FoundLayer("mlp", block, router, nn.Identity())


def with_tensor(name: str, tensor: Tensor) -> nn.Module:
    router = nn.Linear(2, EXPERTS)
    if isinstance(tensor, nn.Parameter):
        router.register_parameter(name, tensor)
    else:
        router.register_buffer(name, tensor)
    return router


def own(family: str) -> tuple[nn.Module, OwnBias]:
    layer = find_layers(make_model(family))[-1]
    found = find_own_bias(layer)
    assert found is not None
    return layer.block, found


@pytest.mark.parametrize("family", PLACES)
def test_the_bias_of_a_family_is_found(family: str) -> None:
    block, found = own(family)
    path, argument = PLACES[family]
    owner, _, name = path.rpartition(".")
    assert found == OwnBias(block.get_submodule(owner), name, argument)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v2"])
def test_a_family_without_one(family: str) -> None:
    assert find_own_bias(find_layers(make_model(family))[-1]) is None


@pytest.mark.parametrize(
    ("name", "tensor", "is_found"),
    [
        ("expert_bias", torch.zeros(EXPERTS), True),
        ("expert_bias", nn.Parameter(torch.zeros(EXPERTS), requires_grad=False), True),
        ("expert_bias", nn.Parameter(torch.zeros(EXPERTS)), False),
        ("expert_bias_steps", torch.zeros(EXPERTS, dtype=torch.int64), False),
        ("usage", torch.zeros(EXPERTS), False),
    ],
)
def test_trap_T99_what_is_trained_or_has_another_meaning_is_no_bias(name: str, tensor: Tensor, is_found: bool) -> None:
    assert (find_own_bias(layer_of(with_tensor(name, tensor))) is not None) == is_found


def test_the_frozen_bias_of_a_linear_router_is_not_taken() -> None:
    router = nn.Linear(2, EXPERTS).requires_grad_(False)
    assert find_own_bias(layer_of(router)) is None


def test_an_attribute_that_is_none_is_set_by_the_first_write() -> None:
    layer = layer_of(TakesBias(), expert_bias=None)
    found = find_own_bias(layer)
    assert found == OwnBias(layer.block, "expert_bias", "expert_bias")
    assert found.read() is None and found.unsharded() is None
    bias_E = torch.arange(8.0)
    found.write(bias_E)
    value: Any = layer.block.expert_bias
    assert find_own_bias(layer) == found, "what was written is found again, as by a second balancer"
    assert value is not bias_E and torch.equal(value, bias_E)
    found.write(bias_E + 1)
    assert torch.equal(value, bias_E + 1), "in place, where the block reads it"


def test_a_router_with_the_argument_and_a_block_without_the_attribute() -> None:
    assert find_own_bias(layer_of(TakesBias(), other=None)) is None


def test_a_forward_that_is_wrapped_on_the_instance_does_not_hide_the_argument() -> None:
    layer = layer_of(TakesBias(), expert_bias=None)
    inner = layer.router.forward
    vars(layer.router)["forward"] = lambda *args, **kwargs: inner(*args, **kwargs)
    assert find_own_bias(layer) is not None


@pytest.mark.parametrize("family", PLACES)
def test_a_value_that_is_written_is_read_again(family: str) -> None:
    block, found = own(family)
    tensor = dict([*block.named_buffers(), *block.named_parameters()])[PLACES[family][0]]
    bias_E = torch.randn(EXPERTS, generator=torch.Generator().manual_seed(0))
    found.write(bias_E)
    assert torch.equal(tensor.flatten(), bias_E), "the tensor that the model uses and saves"
    read = found.read()
    assert read is not None and read.shape == (EXPERTS,) and torch.equal(read, bias_E)
    read.zero_()
    assert torch.equal(tensor.flatten(), bias_E), "a copy"


@pytest.mark.parametrize("family", PLACES)
def test_trap_T95_a_cast_of_the_model_replaces_the_tensor_that_is_written(family: str) -> None:
    block, found = own(family)
    block.bfloat16()
    found.write(torch.full((EXPERTS,), 0.3))
    tensor = dict([*block.named_buffers(), *block.named_parameters()])[PLACES[family][0]]
    assert tensor.dtype == torch.bfloat16 and tensor.flatten().tolist() == [0.30078125] * EXPERTS
    read, unsharded = found.read(), found.unsharded()
    assert read is not None and (read.dtype, float(read[0])) == (torch.float32, 0.30078125)
    assert unsharded is not None and unsharded.dtype == torch.bfloat16


def test_a_model_without_values_has_no_bias_yet() -> None:
    block, found = own("deepseek_v3")
    block.to("meta")
    assert found.read() is None and found.unsharded() is None


def test_the_shape_of_a_partitioned_tensor() -> None:
    tensor = nn.Parameter(torch.empty(0), requires_grad=False)
    vars(tensor)["ds_shape"] = torch.Size([1, EXPERTS])
    assert full_shape(tensor) == (1, EXPERTS) and full_shape(torch.zeros(3)) == (3,)
