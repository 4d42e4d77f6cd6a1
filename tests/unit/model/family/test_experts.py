"""Experts of other families: what the module says of itself is computed, and the unknown is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_moe.model.convert import make_local
from dist_moe.model.family.experts import FamilyExperts, check_experts, is_swiglu
from dist_moe.moe.experts import Experts, GroupedExperts
from dist_moe.probe.routed_layers import unify_layers
from tests.families.small import build, small_config

OWN = ("gpt_oss", "nemotron_h", "hy_v4", "minimax_m3_vl", "step3p7", "deepseek_v4", "llama4")


def make(original: nn.Module, experts: int) -> Experts:
    return make_local(original, experts, "auto")


def experts_of(family: str) -> nn.Module:
    with torch.device("meta"):
        model = build(small_config(family))
    return unify_layers(model)[-1].experts


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "gemma4", *OWN])
def test_trap_T100_the_experts_of_a_family_compute_what_its_module_does(family: str) -> None:
    original = experts_of(family)
    check_experts(original, make)
    assert isinstance(make(original, 1), FamilyExperts if family in OWN else GroupedExperts)
    assert is_swiglu(original) == (family not in OWN)


def test_trap_T112_the_gate_weights_of_llama_4_are_factors_of_the_input() -> None:
    """As factors of the results they would train another model in silence."""
    original: Any = experts_of("llama4")
    check_experts(original, make)
    rows_QD, ends_e = torch.randn(4, 32), torch.tensor([2, 4], dtype=torch.int32)
    weights_Q = torch.tensor([0.5, 2.0, 0.0, 1.0], requires_grad=True)
    local = make(original, 2)
    for parameter in local.parameters():
        nn.init.normal_(parameter, std=0.3)
    found = local(rows_QD, weights_Q, ends_e)
    wanted = local(weights_Q.unsqueeze(1) * rows_QD, torch.ones(4), ends_e)
    assert torch.allclose(found, wanted, atol=1e-6)
    ours, theirs = (
        torch.autograd.grad(each.square().sum(), weights_Q, retain_graph=True)[0] for each in (found, wanted)
    )
    assert torch.allclose(ours, theirs, rtol=1e-5) and bool(ours.any())


def test_experts_that_weigh_the_results_do_not_take_the_place_of_those_of_llama_4() -> None:
    def weighing_results(original: nn.Module, experts: int) -> Experts:
        made = FamilyExperts(original, experts)
        made.weighs_inputs = False
        return made

    with pytest.raises(ValueError, match="compute something else than the layers"):
        check_experts(experts_of("llama4"), weighing_results)


@pytest.mark.parametrize("family", ["hy_v4", "minimax_m3_vl", "deepseek_v4"])
def test_trap_T100_clamped_experts_are_no_swiglu(family: str) -> None:
    """A layer that ignores what a family does between its projections would train another model in silence."""

    def as_swiglu(original: Any, experts: int) -> Experts:
        _, width, expert_width = original.get_parameter("down_proj").shape
        return GroupedExperts(experts, width, expert_width, getattr(original, "act_fn", nn.SiLU()))

    with pytest.raises(ValueError, match="compute something else than the layers"):
        check_experts(experts_of(family), as_swiglu)


def changed(change: Callable[[Any], None]) -> nn.Module:
    original = experts_of("mixtral")
    change(original)
    return original


def test_a_parameter_that_is_not_known_is_refused() -> None:
    def add(original: Any) -> None:
        original.norm = nn.Parameter(torch.ones(8, device="meta"))

    with pytest.raises(ValueError, match="its experts \\(MixtralExperts\\) have norm, which is not known"):
        make(changed(add), 1)


def test_an_activation_that_the_module_does_not_name_is_refused() -> None:
    def forward(hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return hidden_TD * weights_TK.sum()

    def replace(original: Any) -> None:
        original.forward = forward

    with pytest.raises(ValueError, match="compute something else than the layers"):
        check_experts(changed(replace), make)


def test_a_rank_has_the_rows_of_its_experts() -> None:
    local = make(experts_of("gpt_oss"), 2)
    assert {name: tuple(part.view(1).shape) for name, part in local.parts.items()} == {
        "gate_up_proj": (32, 96),
        "gate_up_proj_bias": (96,),
        "down_proj": (48, 32),
        "down_proj_bias": (32,),
    }
