"""Routers and policies that do not go together are refused before anything starts, each with its reason."""

import itertools
from pathlib import Path

import pytest

from dist_moe.config import ConfigError, load_config, resolve
from dist_moe.config.combinations import POLICIES, SCORES, SELECTIONS, markdown, refusal

ROOT = Path(__file__).parents[3]
DEBUG = ROOT / "configs" / "debug.yaml"  # 12 experts, top-2


def faults(*overrides: str, workers: int = 1) -> list[str]:
    """The violations of the debug config with these values."""
    try:
        resolve(load_config(DEBUG, [*overrides]), workers)
    except ConfigError as error:
        return [str(violation) for violation in error.violations]
    return []


@pytest.mark.parametrize(("selection", "score", "policy"), list(itertools.product(SELECTIONS, SCORES, POLICIES)))
def test_the_config_refuses_what_the_table_refuses(selection: str, score: str, policy: str) -> None:
    overrides = [f"router.selection={selection}", f"router.score={score}", f"balance.policy={policy}"]
    overrides += ["balance.auxiliary_loss=0.01"] if policy == "auxiliary" else []
    refused = refusal(selection, score, policy)
    found = faults(*overrides)
    if refused is None:
        assert found == []
    else:
        assert any(line.endswith(f" {refused.rule}; {refused.remedy}") for line in found)


def test_the_table_in_the_docs_is_the_table_of_the_code() -> None:
    assert markdown() in (ROOT / "docs" / "routing.md").read_text()


TOP_12 = "model.config.num_experts_per_tok=12"
TOP_1 = "model.config.num_experts_per_tok=1"
GROUPS = ["model.config.n_group=3", "model.config.topk_group=2"]
TWO_MICRO_BATCHES = ["train.global_batch=24", "train.micro_batch=12"]
ADAPTIVE = ["router.score=softmax", "balance.policy=adaptive_weight", "balance.cadence=micro_batch"]
UNIFORM = ["router.selection=uniform", "balance.policy=none"]
THRESHOLD = ["router.selection=threshold", "router.score=softmax"]


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        ([*THRESHOLD, "router.max_experts=13"], "router.max_experts=13 is more than the model's 12 experts;"),
        ([*THRESHOLD, "router.budget=13"], "router.budget=13.0 cannot be held, since a token takes 1 to 12 experts;"),
        ([*THRESHOLD, "router.budget=12"], "router.budget=12.0 cannot be held"),
        (["router.threshold=0.5"], "router.threshold=0.5 has no meaning with router.selection=top_k"),
        (["router.skew=2"], "router.skew=2.0 has no meaning with router.selection=top_k"),
        ([*UNIFORM, "balance.auxiliary_loss=0.1"], "balance.auxiliary_loss=0.1 shapes scores that"),
        ([*UNIFORM, "balance.z_loss=0.1"], "balance.z_loss=0.1 shapes scores that"),
        ([*UNIFORM, "router.entropy_loss=0.1"], "router.entropy_loss=0.1 shapes scores that"),
        ([*UNIFORM, *GROUPS], "model.config.n_group=3 limits a token to some groups"),
        ([*THRESHOLD, "router.budget=4", "router.max_experts=3"], "router.budget=4.0 cannot be held"),
        (["router.budget=2"], "router.budget=2.0 has no meaning with router.selection=top_k"),
        (["router.max_experts=2"], "router.max_experts=2 has no meaning with router.selection=top_k"),
        (
            ["balance.policy=quantile", TOP_12],
            "model.config.num_experts_per_tok=12 gives each token all 12 experts",
        ),
        (
            ["balance.policy=quantile", *GROUPS],
            "model.config.n_group=3 closes groups of experts to a token",
        ),
        (["balance.policy=auxiliary"], "balance.auxiliary_loss=0.0 leaves balance.policy=auxiliary without a loss;"),
        (["balance.shapes=mixture"], "balance.shapes=mixture has no meaning with balance.policy=loss_free;"),
        (
            ["balance.policy=quantile", "balance.centre=false"],
            "balance.centre=false lets the biases of balance.policy=quantile drift until margins can no longer be told "
            "apart; leave it out",
        ),
        (["balance.policy=none", "balance.centre=true"], "balance.centre=true has no meaning with balance.policy=none"),
        (["balance.clip=2"], "balance.clip=2.0 has no meaning with balance.policy=loss_free;"),
        (
            ["balance.policy=quantile", "balance.rule=sign"],
            "balance.rule=sign has no meaning with",
        ),
        (["balance.policy=none", "balance.form=multiplicative"], "balance.form=multiplicative has no meaning"),
        (["balance.policy=none", "balance.freeze_at=3"], "balance.freeze_at=3 has no meaning with balance.policy=none"),
        (
            [*ADAPTIVE, *TWO_MICRO_BATCHES],
            "balance.cadence=micro_batch would change the routing within a step of 2 micro-batches;",
        ),
        (["router.threshold=1"], "router.threshold=1 should be less than 1;"),
    ],
)
def test_fields_that_do_not_fit_are_refused(overrides: list[str], fault: str) -> None:
    found = faults(*overrides)
    assert any(line.startswith(fault) for line in found), found


@pytest.mark.parametrize("name", ["softmax_selected", "normalise", "max_experts"])
def test_trap_T18_a_single_expert_whose_weight_is_always_1_is_refused(name: str) -> None:
    single = {
        "softmax_selected": [
            "router.score=softmax_selected",
            "model.config.num_experts_per_tok=1",
            "model.config.norm_topk_prob=false",
        ],
        "normalise": [TOP_1],
        "max_experts": [*THRESHOLD, "router.max_experts=1", "router.normalise=true"],
    }[name]
    assert any("so the router cannot learn" in line for line in faults(*single))


def test_what_is_left_out_is_filled_in() -> None:
    config = resolve(load_config(DEBUG, THRESHOLD), 1).config
    assert config.router.max_experts == 12
    assert config.router.normalise is False, "the paper's, whatever the family says of its top-K"
    assert config.router.scaling == 1.0
    top_k = resolve(load_config(DEBUG), 1).config.router
    assert (top_k.max_experts, top_k.normalise) == (None, True)


def test_micro_batch_cadence_is_the_step_s_where_each_worker_has_one() -> None:
    assert faults(*ADAPTIVE, *TWO_MICRO_BATCHES, workers=2) == []
