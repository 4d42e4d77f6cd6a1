"""Blocks that do a part of the routing (Jamba, Llama 4): they are called as others are, and nothing else changes."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dist_moe
from dist_moe.errors import UserError
from dist_moe.probe.in_place import InPlace
from dist_moe.probe.layers import find_layers
from dist_moe.probe.routed_layers import unify_layers
from dist_moe.probe.router_probe import probe_router
from tests.families.small import VOCABULARY, build, small_config

NO_GROUPS = (1, 1)
RULES = {"jamba": "softmax", "llama4": "sigmoid"}


def made(family: str) -> Any:
    """A small model with random weights."""
    torch.manual_seed(0)
    return build(small_config(family))


def results(model: Any) -> list[Tensor | None]:
    """The loss of some tokens, and the gradients."""
    tokens = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return [loss, *[parameter.grad for parameter in model.parameters()]]


def equal(ones: list[Tensor | None], others: list[Tensor | None]) -> bool:
    """Bit for bit."""
    pairs = zip(ones, others, strict=True)
    return all(
        one is other or (one is not None and other is not None and torch.equal(one, other)) for one, other in pairs
    )


def classes_of(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("family", RULES)
def test_the_model_computes_the_same_and_so_do_its_copies(family: str) -> None:
    model = made(family)
    changed, parameters, modules = copy.deepcopy(model), dict(model.named_parameters()), list(model.modules())
    unify_layers(changed)
    copied, unpickled = copy.deepcopy(changed), pickle.loads(pickle.dumps(changed))
    wanted = results(model)
    for each in (changed, copied, unpickled):
        assert equal(results(each), wanted)
        assert list(each.state_dict()) == list(model.state_dict())
        assert [type(module).__name__ for module in each.modules()] == [type(module).__name__ for module in modules]
        assert probe_router(unify_layers(each)[-1], None, NO_GROUPS).rule is not None
    unify_layers(model)
    assert list(model.modules()) == modules, "the same objects"
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())


@pytest.mark.parametrize("family", RULES)
def test_the_rule_of_the_router_is_found_then(family: str) -> None:
    with torch.device("meta"):
        model = build(small_config(family))
    with pytest.raises(UserError, match="in which logits, gate weights and ids of experts cannot be identified"):
        probe_router(find_layers(model)[-1], None, NO_GROUPS)
    rule = probe_router(unify_layers(model)[-1], None, NO_GROUPS).rule
    assert rule is not None
    assert (rule.score, rule.top_k, rule.normalize) == (RULES[family], 2, False)
    classes = classes_of(model)
    unify_layers(model)
    assert classes_of(model) == classes, "a second time changes nothing"


@pytest.mark.parametrize("family", RULES)
def test_transformers_records_the_same_logits_of_the_router(family: str) -> None:
    model, tokens = made(family), torch.randint(VOCABULARY, (2, 16))
    before = model.model(input_ids=tokens, use_cache=False, output_router_logits=True).router_logits
    unify_layers(model)
    after = model.model(input_ids=tokens, use_cache=False, output_router_logits=True).router_logits
    assert len(before) and equal(list(after), list(before))


@pytest.mark.parametrize("family", RULES)
def test_a_model_is_the_same_after_a_balancer(family: str) -> None:
    model, twin = made(family), made(family)
    balancer = dist_moe.balance(model)
    assert {layer.bias for layer in balancer.layers} == {"ours"}
    for state in balancer._states.values():
        state.selection_bias[3] = 100.0
    tokens = torch.randint(VOCABULARY, (2, 16))
    model.train()(input_ids=tokens, use_cache=False)
    assert all(counts[3] == 32 for counts in balancer.step().counts_LE)
    balancer.remove()
    assert equal(results(model.eval()), results(twin.eval()))


def test_blocks_of_other_kinds_stay_as_they_are() -> None:
    with torch.device("meta"):
        model = build(small_config("mixtral"))
    before = classes_of(model)
    unify_layers(model)
    assert classes_of(model) == before


@pytest.mark.parametrize("family", RULES)
def test_trap_T111_a_router_whose_forward_was_replaced_stays_as_it_is(family: str) -> None:
    """A framework calls the forward that it has found: the block would take its results for others."""
    model, twin = made(family), made(family)
    for layer in find_layers(model):
        layer.router.forward = layer.router.forward
    with pytest.raises(UserError, match="cannot be identified"):
        dist_moe.balance(model)
    assert equal(results(model), results(twin))


def weighing_results(block: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """As Llama 4, with the gate weights as factors of the results."""
    hidden_TD = hidden.reshape(-1, block.hidden_dim)
    scores_TE, logits_TE = block.router(hidden_TD)
    results_ETD = block.experts(hidden_TD.repeat(block.num_experts, 1)).view(block.num_experts, *hidden_TD.shape)
    return block.shared_expert(hidden_TD) + (results_ETD * scores_TE.t().unsqueeze(2)).sum(0), logits_TE


def scaling_shared(block: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """As Llama 4, with a factor on the shared expert."""
    summed_TD, logits_TE = super(type(block), block).forward(hidden)
    return summed_TD + block.shared_expert(hidden.reshape(-1, block.hidden_dim)), logits_TE


def returning_scores(block: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """As Llama 4, with the scores in the place of the logits."""
    summed_TD, _ = super(type(block), block).forward(hidden)
    return summed_TD, block.router(hidden.reshape(-1, block.hidden_dim))[0]


@pytest.mark.parametrize("forward", [weighing_results, scaling_shared, returning_scores])
def test_trap_T112_a_block_that_computes_something_else_stays_as_it_is(forward: Any) -> None:
    """It would be trained as another model in silence."""
    model = made("llama4")
    for layer in find_layers(model):
        layer.block.__class__ = type("OtherBlock", (type(layer.block),), {"forward": forward})
    before = results(model)
    model.zero_grad()
    with pytest.raises(UserError, match="cannot be identified"):
        dist_moe.balance(model)
    assert not any(isinstance(module, InPlace) for module in model.modules())
    assert equal(results(model), before)


def test_experts_of_a_rank_stay_as_they_are() -> None:
    """As tensor or expert parallelism of transformers has divided them."""
    model = made("llama4")
    for layer in find_layers(model):
        for name, parameter in list(layer.experts.named_parameters()):
            setattr(layer.experts, name, nn.Parameter(parameter.detach()[:4]))
    with pytest.raises(UserError, match="cannot be identified"):
        dist_moe.balance(model)
