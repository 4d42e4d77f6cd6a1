"""Experts of other families: what the module says of itself is computed, and the unknown is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_moe.model.convert import make_local
from dist_moe.model.family.experts import FamilyExperts, check_experts, is_swiglu
from dist_moe.moe.experts import Experts, GroupedExperts
from dist_moe.probe.layers import find_layers
from tests.families.small import build, small_config

OWN = ("gpt_oss", "nemotron_h", "hy_v4", "minimax_m3_vl", "step3p7", "deepseek_v4")


def make(original: nn.Module, experts: int) -> Experts:
    return make_local(original, experts, "auto")


def experts_of(family: str) -> nn.Module:
    with torch.device("meta"):
        return find_layers(build(small_config(family)))[-1].experts


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "gemma4", *OWN])
def test_trap_T100_the_experts_of_a_family_compute_what_its_module_does(family: str) -> None:
    original = experts_of(family)
    check_experts(original, make)
    assert isinstance(make(original, 1), FamilyExperts if family in OWN else GroupedExperts)
    assert is_swiglu(original) == (family not in OWN)


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
