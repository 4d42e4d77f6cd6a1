"""Every combination of selection, score and policy that the config allows runs, learns, and does not see ahead."""

import itertools

import pytest
import torch
from torch import Tensor

from dist_moe.balancing.balancer import Balancer
from dist_moe.balancing.losses import RoutingLosses
from dist_moe.config.combinations import RANDOM_SELECTIONS, SCORES, SELECTIONS, refusal
from dist_moe.config.model import VARYING_SELECTIONS
from dist_moe.config.sections.router import RouterConfig
from dist_moe.model.build import build_model, routing_rule
from dist_moe.model.inputs import ModelInputs
from dist_moe.model.tasks.language_model import LanguageModelTask
from dist_moe.policies.registry import POLICIES, make_policy
from tests.unit.model.samples import ALONE, FAMILIES, tokens

ALLOWED = [
    combination for combination in itertools.product(SELECTIONS, SCORES, POLICIES) if refusal(*combination) is None
]
LENGTH = 24


def make(selection: str, score: str, policy: str) -> tuple[LanguageModelTask, Balancer]:
    """The small DeepSeek-V3 with this routing, as the config would have it."""
    router = RouterConfig.model_validate(
        {"selection": selection, "score": score, "top_k": 2, "normalize": False, "scaling_factor": 1.0, "groups": 1}
        | {"topk_groups": 1, "threshold": 0.5, "max_experts": 4 if selection in VARYING_SELECTIONS else None}
    )
    balance = make_policy(policy, rate=0.05)
    model = build_model(
        "deepseek_v3",
        FAMILIES["deepseek_v3"][0],
        routing_rule(router, balance, "deepseek_v3"),
        ALONE,
        seed=0,
    )
    losses = RoutingLosses(balance=0.1 if policy == "auxiliary" else 0.0)
    task = LanguageModelTask(model, losses, balance.needs_margins)
    balancer = Balancer({layer.name: layer.router for layer in task.layers}, balance, torch.device("cpu"), 100)
    return task, balancer


def step(task: LanguageModelTask, balancer: Balancer, tokens_BS: Tensor) -> None:
    """A forward, a backward and an update of the balance; the weights stay."""
    positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    scale = torch.tensor(1.0 / tokens_BS.numel())
    output = task(ModelInputs(tokens_BS, tokens_BS.roll(-1, 1), positions_BS), scale, scale)
    output.loss.backward()
    balancer.observe(output.routing_counts)
    balancer.step()


@pytest.mark.parametrize(("selection", "score", "policy"), ALLOWED)
def test_every_allowed_combination_learns_and_balances(selection: str, score: str, policy: str) -> None:
    task, balancer = make(selection, score, policy)
    for _ in range(2):  # the loss over the global batch has no load in the first step
        step(task, balancer, tokens(2, LENGTH))
    for layer in task.layers:
        gradient = layer.router.weight.grad
        assert gradient is not None and gradient.isfinite().all() and gradient.any()
        assert bool(layer.router.selection_bias.any()) == balancer.policy.moves_bias
        assert bool(layer.router.last_load.any()) == (selection not in RANDOM_SELECTIONS)


def choices(task: LanguageModelTask, tokens_BS: Tensor) -> list[list[list[set[int]]]]:
    """The experts of each token, [layer][sequence][position]."""
    for layer in task.layers:
        layer.router.open_record(None)
    positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    task.model(input_ids=tokens_BS, position_ids=positions_BS, use_cache=False)
    ids = [layer.router.close_record().ids_TK.view(*tokens_BS.shape, -1) for layer in task.layers]
    return [[[set(token) - {-1} for token in row] for row in ids_BSK.tolist()] for ids_BSK in ids]


@pytest.mark.parametrize(("selection", "score", "policy"), [one for one in ALLOWED if one[0] not in RANDOM_SELECTIONS])
def test_a_later_token_changes_no_choice_of_an_earlier_one(selection: str, score: str, policy: str) -> None:
    """In training mode, with a bias that has moved: what is known of a batch acts on the next one alone."""
    task, balancer = make(selection, score, policy)
    for _ in range(3):
        step(task, balancer, tokens(2, LENGTH))
    before = choices(task, tokens(2, LENGTH))
    for place in (5, LENGTH - 1):
        changed_BS = tokens(2, LENGTH)
        changed_BS[:, place] = (changed_BS[:, place] + 7) % 50 + 1
        after = choices(task, changed_BS)
        for layer, changed_layer in zip(before, after, strict=True):
            for row, changed_row in zip(layer, changed_layer, strict=True):
                assert changed_row[:place] == row[:place]
    assert choices(task, (tokens(2, LENGTH) + 3) % 50 + 1) != before, "the tokens do matter"
