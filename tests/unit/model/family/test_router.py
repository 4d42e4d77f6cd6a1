"""Routers of other families: their logits, the rules of this package, and the results in the place of their own."""

import copy

import pytest
import torch
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4TopKRouter

from dist_moe.errors import UserError
from dist_moe.model.build import empty_model, family_rule, materialize, parameter_groups
from dist_moe.model.convert import find_layers
from dist_moe.model.family.router import FamilyRouter
from dist_moe.moe.select import ThresholdRouting
from tests.families.small import small_config
from tests.family_models import ALONE, COVERING, converted


@pytest.mark.parametrize("family", COVERING)
def test_padding_is_not_routed_and_the_record_has_the_results(family: str) -> None:
    model = converted(small_config(family))
    layers = find_layers(model)
    assert all(isinstance(layer.router, FamilyRouter) for layer in layers)
    tokens = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(0))
    mask_T = torch.arange(16) % 8 < 6
    for layer in layers:
        layer.router.open_record(mask_T)
    model(input_ids=tokens, use_cache=False)
    for layer in layers:
        record = layer.router.close_record()
        assert record.logits_TE.dtype == torch.float32 and record.logits_TE.shape == (16, 8)
        assert bool((record.ids_TK[~mask_T] == -1).all()) and bool((record.ids_TK[mask_T] >= 0).all())


@pytest.mark.parametrize("family", ["granitemoe", "minimax_m2", "ernie4_5_moe", "gemma4"])
def test_the_selection_bias_moves_the_selection_and_the_family_s_own_stays_0(family: str) -> None:
    layer = find_layers(converted(small_config(family)))[-1]
    layer.router.selection_bias[5] = 100.0
    hidden = torch.randn(12, 32)
    own = layer.router.family_bias
    others = () if own is None or own.argument is None else (getattr(own.owner, own.name),)  # type: ignore[attr-defined]
    returned = layer.router(hidden, *others)
    ids_TK = next(each for each in returned if not each.is_floating_point())
    assert bool((ids_TK == 5).any(dim=1).all())
    if own is not None:
        assert not bool(getattr(own.owner, own.name).any())
        assert not any(name.endswith(own.name) for name in layer.router.state_dict())


def test_threshold_routing_takes_the_place_of_top_k() -> None:
    config = small_config("granitemoe")
    model = empty_model(copy.deepcopy(config), ThresholdRouting(0.5, 6), ALONE)
    materialize(model)
    router = find_layers(model)[0].router
    with torch.no_grad():
        router.matrix.copy_(torch.randn(router.matrix.shape) / 8)
    router.reset_state()
    first, second, third = router(torch.randn(20, 32))
    assert first.shape == second.shape and first.shape[1] > 2 and bool((first == -1).any()), "ids come first here"
    assert third.shape == (20, 8)


def test_a_router_in_bf16_computes_its_logits_in_fp32() -> None:
    model = converted(small_config("olmoe"))
    router = find_layers(model)[0].router
    hidden = torch.randn(64, 32).bfloat16()
    wanted = hidden.float() @ router.matrix.bfloat16().float().T
    router.bfloat16()
    assert router.selection_bias.dtype == torch.float32
    router.open_record(None)
    router(hidden)
    assert torch.equal(router.close_record().logits_TE, wanted)


def test_trap_T100_another_rule_than_that_of_the_record_is_refused() -> None:
    config = small_config("deepseek_v2", topk_method="group_limited_greedy", n_group=4, topk_group=1)
    with pytest.raises(UserError, match=r"of the deepseek_v2 model routes by TopK.*groups=4.*differs from the TopK"):
        empty_model(config, family_rule(config, "softmax"), ALONE)


def test_trap_T101_weights_that_a_class_leaves_undefined_are_drawn() -> None:
    """On the meta device the zeros of a constructor are lost, and memory that was never written trains on."""
    routers = [find_layers(converted(small_config("ernie4_5_moe")))[-1].router.matrix for _ in range(2)]
    assert torch.equal(*routers) and 0.01 < float(routers[0].detach().std()) < 0.03


def test_layers_that_cannot_be_trained_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A router of another version of transformers, which is called with the positions, too."""
    own = DeepseekV4TopKRouter.forward
    monkeypatch.setattr(DeepseekV4TopKRouter, "forward", lambda self, hidden, positions: own(self, hidden))
    config = small_config("deepseek_v4")
    with pytest.raises(
        UserError,
        match=r"^model\.layers\.\d\.mlp of the deepseek_v4 model cannot be trained: .*called with positions",
    ):
        empty_model(config, family_rule(config, "sqrt_softplus"), ALONE)


def test_biases_of_experts_are_not_decayed() -> None:
    model = converted(small_config("gpt_oss"))
    plain = {id(each) for each in parameter_groups(model, 0.1)[1]["params"]}
    local = find_layers(model)[0].experts.local
    assert {name for name, each in local.named_parameters() if id(each) in plain} == {
        "gate_up_proj_bias",
        "down_proj_bias",
    }
