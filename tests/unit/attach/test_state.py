"""The state of a layer: its bias in fp32, how the model gets it, and the selection with a bias of the balancer."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_moe.attach.state import LayerState, select_again
from dist_moe.errors import UserError
from dist_moe.probe.layers import FoundLayer, find_layers
from tests.attached import EXPERTS, make_model


class Scaled(nn.Module):
    """A router that returns probabilities, and multiplies the gate weights by a factor of each expert."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(EXPERTS, 16, generator=generator))
        self.scale = nn.Parameter(torch.linspace(0.5, 2, EXPERTS))

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        probabilities_TE = (hidden_TD @ self.weight.T).softmax(dim=1)
        weights_TK, ids_TK = probabilities_TE.topk(2, dim=1)
        return probabilities_TE, weights_TK / weights_TK.sum(dim=1, keepdim=True) * self.scale[ids_TK], ids_TK


class LogitsAlone(nn.Linear):
    """A router whose experts are chosen elsewhere."""


def last_state(family: str) -> LayerState:
    return LayerState(find_layers(make_model(family))[-1])


def own_bias(state: LayerState) -> Tensor:
    return state.layer.router.get_buffer("e_score_correction_bias")


def test_a_layer_without_a_bias_starts_with_zeros() -> None:
    state = last_state("qwen3_moe")
    assert (state.probed.bias, state.is_balanced) == ("ours", True)
    assert torch.equal(state.selection_bias, torch.zeros(EXPERTS)) and state.selection_bias.dtype == torch.float32
    assert torch.equal(state.last_load, torch.zeros(EXPERTS, dtype=torch.int64))
    assert (state.top_k, state.max_experts_per_token, state.may_take_none, state.threshold) == (2, 2, False, None)


def test_a_layer_starts_with_the_bias_of_its_model() -> None:
    layer = find_layers(make_model("deepseek_v3"))[-1]
    bias_E = torch.linspace(-0.1, 0.1, EXPERTS)
    layer.router.get_buffer("e_score_correction_bias").copy_(bias_E)
    state = LayerState(layer)
    assert torch.equal(state.selection_bias, bias_E)
    state.selection_bias += 1
    assert torch.equal(own_bias(state), bias_E), "changed by write alone"
    state.write()
    assert torch.equal(own_bias(state), bias_E + 1)


def test_a_layer_that_cannot_be_read_is_named() -> None:
    layer = FoundLayer("model.layers.3.mlp", nn.Module(), LogitsAlone(4, EXPERTS), nn.Identity())
    with pytest.raises(
        UserError,
        match=r"^model\.layers\.3\.mlp \(LogitsAlone\): the router returns float32\[256, 8\], in which logits, gate "
        r"weights and ids of experts cannot be identified; its load cannot be counted$",
    ):
        LayerState(layer)


def test_trap_T95_small_steps_add_up_in_a_model_in_bf16() -> None:
    """1 + 0.001 is 1 in bf16; after ten steps it is 1.01, which is not."""
    state = last_state("deepseek_v3")
    state.layer.block.bfloat16()
    state.selection_bias.fill_(1.0)
    state.write()
    for _ in range(10):
        state.adopt()
        state.selection_bias += 0.001
        state.write()
    torch.testing.assert_close(state.selection_bias, torch.full((EXPERTS,), 1.01))
    assert own_bias(state).dtype == torch.bfloat16 and own_bias(state).tolist() == [1.0078125] * EXPERTS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trap_T95_a_bias_that_was_loaded_afterwards_is_adopted(dtype: torch.dtype) -> None:
    state = last_state("deepseek_v3")
    state.layer.block.to(dtype)
    state.selection_bias.fill_(1.001)
    state.write()
    changed_E = own_bias(state).clone()
    changed_E[3], changed_E[5] = -0.5, 0.25
    state.layer.router.load_state_dict({"e_score_correction_bias": changed_E}, strict=False)
    state.adopt()
    wanted_E = torch.full((EXPERTS,), 1.001)
    wanted_E[3], wanted_E[5] = -0.5, 0.25
    assert torch.equal(state.selection_bias, wanted_E) and state.selection_bias.dtype == torch.float32


def test_without_a_bias_of_the_model_nothing_is_adopted_or_written() -> None:
    state = last_state("qwen3_moe")
    before = {name: value.clone() for name, value in state.layer.block.state_dict().items()}
    state.selection_bias.fill_(2.0)
    state.write()
    state.adopt()
    assert state.selection_bias.tolist() == [2.0] * EXPERTS
    after = state.layer.block.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_the_bias_of_a_model_on_the_meta_device_starts_at_zero() -> None:
    layer = find_layers(make_model("deepseek_v3").to("meta"))[-1]
    state = LayerState(layer)
    assert state.probed.bias == "own" and not state.selection_bias.any()
    state.adopt()
    state.write()
    assert state.selection_bias.device.type == "cpu" and own_bias(state).is_meta


@pytest.mark.parametrize(("family", "order"), [("qwen3_moe", (0, 1, 2)), ("granitemoe", (2, 1, 0))])
def test_the_results_of_a_router_are_selected_again(family: str, order: tuple[int, int, int]) -> None:
    state = last_state(family)
    state.selection_bias.copy_(torch.linspace(3, -3, EXPERTS))
    hidden_TD = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    returned = state.layer.router(hidden_TD)
    found = select_again(state, state.layer.router, returned)
    logits_TE, weights_TK, ids_TK = (found[place] for place in order)
    assert logits_TE is returned[order[0]] and len(found) == 3
    wanted_TK = (logits_TE + state.selection_bias).topk(2, dim=1).indices.sort(dim=1).values
    ids_TK, place_TK = ids_TK.sort(dim=1)
    assert torch.equal(ids_TK, wanted_TK)
    assert not torch.equal(ids_TK, returned[order[2]].sort(dim=1).values), "without the bias they were others"
    scores_TK = logits_TE.exp().gather(1, ids_TK)
    torch.testing.assert_close(weights_TK.gather(1, place_TK), scores_TK / scores_TK.sum(dim=1, keepdim=True))


def test_trap_T99_with_a_bias_of_zero_the_results_and_gradients_are_those_of_the_router() -> None:
    """The same experts and gate weights, and the same gradients of the router."""
    state = last_state("mixtral")
    hidden_TD = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    parameter = state.layer.router.get_parameter("weight")
    results = []
    for again in (False, True):
        returned = state.layer.router(hidden_TD)
        _, weights_TK, ids_TK = select_again(state, state.layer.router, returned) if again else returned
        ids_TK, place_TK = ids_TK.sort(dim=1)
        weights_TK = weights_TK.gather(1, place_TK)
        (gradient_ED,) = torch.autograd.grad((weights_TK * ids_TK).square().sum(), parameter)
        results.append((ids_TK, weights_TK.detach(), gradient_ED))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0], results[1])
    assert bool(results[1][2].any())


def test_trap_T99_the_factor_of_an_expert_is_that_of_the_expert_that_is_selected() -> None:
    state = LayerState(FoundLayer("mlp", nn.Module(), Scaled(), nn.Identity()))
    hidden_TD = torch.randn(20, 16, generator=torch.Generator().manual_seed(1))
    router: Any = state.layer.router
    state.selection_bias.copy_(torch.linspace(3, -3, EXPERTS))
    _, weights_TK, ids_TK = select_again(state, router, router(hidden_TD))
    logits_TE = hidden_TD @ router.weight.T
    for token, ids in enumerate(ids_TK.tolist()):
        assert set(ids) == set((logits_TE[token] + state.selection_bias).topk(2).indices.tolist())
        scores = logits_TE[token, ids].exp()
        torch.testing.assert_close(weights_TK[token], scores / scores.sum() * router.scale[ids])
    (gradient_E,) = torch.autograd.grad(weights_TK.sum(), router.scale)
    assert bool(gradient_E[ids_TK.unique()].all())


def test_results_keep_their_shape_and_precision() -> None:
    state = last_state("qwen3_moe")
    returned = (torch.randn(2, 5, EXPERTS).bfloat16(), torch.rand(2, 5, 2).bfloat16(), torch.ones(2, 5, 2).int())
    _, weights, ids = select_again(state, state.layer.router, returned)
    assert (weights.shape, weights.dtype) == ((2, 5, 2), torch.bfloat16)
    assert (ids.shape, ids.dtype) == ((2, 5, 2), torch.int32)
