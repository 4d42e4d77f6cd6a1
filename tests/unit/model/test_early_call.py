"""A module that runs before its place: the same results and gradients, and no result of another tensor."""

import copy

import pytest
import torch
from torch import nn

from dist_moe.model.early_call import EarlyCall


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 4)


def test_a_started_call_has_the_same_result_and_gradients(module: nn.Module) -> None:
    hidden_BSD = torch.randn(2, 3, 4, requires_grad=True)
    wanted = module(hidden_BSD)
    wanted_gradients = torch.autograd.grad(wanted.square().sum(), [hidden_BSD, *module.parameters()])
    names = list(module.state_dict())
    early = EarlyCall(module)
    early.start(hidden_BSD.view(-1, 4))
    found = module(hidden_BSD)
    torch.testing.assert_close(found, wanted)
    found_gradients = torch.autograd.grad(found.square().sum(), [hidden_BSD, *module.parameters()])
    torch.testing.assert_close(found_gradients, wanted_gradients)
    assert list(module.state_dict()) == names


def test_trap_T36_another_tensor_is_computed_and_a_result_is_used_once(module: nn.Module) -> None:
    one, other = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    wanted_one, wanted_other = module(one), module(other)
    early = EarlyCall(module)
    early.start(one)
    torch.testing.assert_close(module(other), wanted_other)
    early.start(one)
    one_changed = module(one)
    one.zero_()
    torch.testing.assert_close(one_changed, wanted_one)
    torch.testing.assert_close(module(one), module.get_parameter("bias").expand(2, 3, 4))


def test_a_copy_of_the_module_computes_with_its_own_parameters(module: nn.Module) -> None:
    EarlyCall(module)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.get_parameter("weight").zero_()
    torch.testing.assert_close(twin(torch.ones(1, 4)), twin.get_parameter("bias").unsqueeze(0))
