"""Every key of router and balance arrives where it acts: in the rule, in the balancer's settings, or in the losses."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_moe.comm.mesh import Mesh
from dist_moe.config import load_config, resolve
from dist_moe.model.build import build_model, routing_rule
from dist_moe.model.tasks.language_model import LanguageModelTask
from dist_moe.moe.select import RandomRouting, ThresholdRouting, TopK
from dist_moe.policies.loss_free import LossFree
from dist_moe.train.setup import build_balancer, routing_losses
from tests.dist.small import DEEPSEEK

DEBUG = Path(__file__).parents[3] / "configs" / "debug.yaml"
SOFTMAX = ["router.score=softmax"]
THRESHOLD = [*SOFTMAX, "router.selection=threshold"]
ADAPTIVE = [*SOFTMAX, "balance.policy=adaptive_weight"]


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ([], TopK(2, "sigmoid", normalize=True)),
        (["router.score=sqrt_softplus"], TopK(2, "sqrt_softplus", normalize=True)),
        (["model.config.n_group=3", "model.config.topk_group=2"], TopK(2, "sigmoid", True, 1.0, 3, 2)),
        (["balance.form=multiplicative"], TopK(2, "sigmoid", normalize=True, multiplicative=True)),
        ([*ADAPTIVE, "balance.applies_to=gate_weights"], TopK(2, "softmax", normalize=True, bias_in_gate_weights=True)),
        ([*THRESHOLD, "router.threshold=0.7"], ThresholdRouting(0.7, 12)),
        (
            [*THRESHOLD, "router.max_experts=3", "router.normalize=true", "router.scaling_factor=2"],
            ThresholdRouting(0.4, 3, True, 2.0),
        ),
        (
            ["router.selection=zipf", "router.zipf_exponent=2", "balance.policy=none"],
            RandomRouting(2, 2.0, "sigmoid", True),
        ),
        (["router.selection=uniform", "balance.policy=none"], RandomRouting(2, 0.0, "sigmoid", True)),
    ],
)
def test_the_rule(overrides: list[str], wanted: Any) -> None:
    config = resolve(load_config(DEBUG, overrides), 1).config
    assert routing_rule(config.router, config.balance, "deepseek_v3") == wanted


@pytest.mark.parametrize(
    ("overrides", "field", "wanted"),
    [
        (["balance.rate=0.5"], "rate", 0.5),
        (["balance.schedule=quadratic"], "schedule", "quadratic"),
        (["balance.center=true"], "centers", True),
        (["balance.center=false"], "centers", False),
        ([], "centers", False),
        (ADAPTIVE, "centers", True),
        (["balance.policy=quantile"], "centers", True),
        (["balance.rule=proportional"], "proportional", True),
        (["balance.rule=sign"], "proportional", False),
        ([], "proportional", False),
        (ADAPTIVE, "proportional", True),
        (["balance.freeze_at=3"], "freeze_at", 3),
        ([*ADAPTIVE, "balance.clip=7"], "clip", 7.0),
    ],
)
def test_the_policy(overrides: list[str], field: str, wanted: Any) -> None:
    config = resolve(load_config(DEBUG, overrides), 1).config
    assert getattr(config.balance, field) == wanted


def test_the_balancer() -> None:
    overrides = [*THRESHOLD, "router.target_experts_per_token=3", "train.schedule_steps=77", "balance.rate=0.5"]
    config = resolve(load_config(DEBUG, overrides), 1).config
    meshed = Mesh(world_size=1, rank=0, expert_parallel=1)
    model = build_model(
        "deepseek_v3", DEEPSEEK, routing_rule(config.router, config.balance, "deepseek_v3"), meshed, seed=0
    )
    balancer = build_balancer(LanguageModelTask(model), config, torch.device("cpu"))
    assert balancer.policy == LossFree(rate=0.5, schedule="linear")
    assert (balancer.schedule_steps, balancer.target_experts_per_token) == (77, 3.0)


@pytest.mark.parametrize(
    ("override", "field", "wanted"),
    [
        ("balance.auxiliary_loss=0.5", "balance", 0.5),
        ("balance.auxiliary_scope=sequence", "scope", "sequence"),
        ("balance.z_loss=0.25", "z", 0.25),
        ("router.entropy_loss=0.125", "entropy", 0.125),
    ],
)
def test_the_losses(override: str, field: str, wanted: Any) -> None:
    config = resolve(load_config(DEBUG, [override]), 1).config
    assert getattr(routing_losses(config), field) == wanted
    assert routing_losses(config).any == (field != "scope")
