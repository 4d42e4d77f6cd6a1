"""Routers and policies that do not go together are refused before anything starts, each with its reason."""

import itertools
from pathlib import Path

import pytest

from dist_moe.config import ConfigError, load_config, resolve
from dist_moe.config.combinations import SCORES, SELECTIONS, markdown, refusal
from dist_moe.policies.registry import POLICIES

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
EXPERT_THRESHOLD = ["router.selection=expert_threshold", "balance.policy=expert_threshold"]
UNIFORM = ["router.selection=uniform", "balance.policy=none"]
THRESHOLD = ["router.selection=threshold", "router.score=softmax"]


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        ([*THRESHOLD, "router.max_experts=13"], "router.max_experts=13 is more than the model's 12 experts;"),
        (
            [*THRESHOLD, "router.target_experts_per_token=13"],
            "router.target_experts_per_token=13.0 cannot be reached, since a token takes 1 to 12 experts;",
        ),
        ([*THRESHOLD, "router.target_experts_per_token=12"], "router.target_experts_per_token=12.0 cannot be reached"),
        (["router.threshold=0.5"], "router.threshold=0.5 has no meaning with router.selection=top_k"),
        (["router.zipf_exponent=2"], "router.zipf_exponent=2.0 has no meaning with router.selection=top_k"),
        ([*UNIFORM, "balance.auxiliary_loss=0.1"], "balance.auxiliary_loss=0.1 trains scores that"),
        ([*UNIFORM, "balance.z_loss=0.1"], "balance.z_loss=0.1 trains scores that"),
        ([*UNIFORM, "router.entropy_loss=0.1"], "router.entropy_loss=0.1 trains scores that"),
        ([*UNIFORM, *GROUPS], "model.config.n_group=3 limits a token to some groups"),
        (
            [*THRESHOLD, "router.target_experts_per_token=4", "router.max_experts=3"],
            "router.target_experts_per_token=4.0 cannot be reached",
        ),
        (
            ["router.target_experts_per_token=2"],
            "router.target_experts_per_token=2.0 has no meaning with router.selection=top_k",
        ),
        (["router.max_experts=2"], "router.max_experts=2 has no meaning with router.selection=top_k"),
        (
            ["balance.policy=quantile", TOP_12],
            "model.config.num_experts_per_tok=12 gives each token all 12 experts",
        ),
        (
            ["balance.policy=quantile", *GROUPS],
            "model.config.n_group=3 excludes groups of experts for a token",
        ),
        (["balance.policy=auxiliary"], "balance.auxiliary_loss=0.0 leaves balance.policy=auxiliary without a loss;"),
        (
            ["balance.applies_to=gate_weights"],
            "balance.applies_to=gate_weights has no meaning with balance.policy=loss_free;",
        ),
        (
            ["balance.policy=quantile", "balance.center=false"],
            "balance.center=false lets the biases of balance.policy=quantile drift until their histograms lose "
            "resolution; leave it out",
        ),
        (["balance.policy=none", "balance.center=true"], "balance.center=true has no meaning with balance.policy=none"),
        (["balance.clip=2"], "balance.clip=2 has no meaning with balance.policy=loss_free;"),
        (
            ["balance.policy=quantile", "balance.rule=sign"],
            "balance.rule=sign has no meaning with",
        ),
        (["balance.policy=none", "balance.form=multiplicative"], "balance.form=multiplicative has no meaning"),
        (["balance.policy=none", "balance.freeze_at=3"], "balance.freeze_at=3 has no meaning with balance.policy=none"),
        (
            [*EXPERT_THRESHOLD, "router.threshold=0.5"],
            "router.threshold=0.5 has no meaning with router.selection=expert_t",
        ),
        (
            [*EXPERT_THRESHOLD, "router.max_experts=1"],
            "router.max_experts=1 is less than the 2 experts that a token takes",
        ),
        ([*EXPERT_THRESHOLD, "router.max_experts=13"], "router.max_experts=13 is more than the model's 12 experts;"),
        ([*EXPERT_THRESHOLD, "balance.center=true"], "balance.center=true shifts all thresholds"),
        ([*EXPERT_THRESHOLD, *GROUPS], "model.config.n_group=3 excludes groups of experts for a token"),
        (["router.min_experts=1"], "router.min_experts=1 has no meaning with router.selection=top_k"),
        (
            ["balance.policy=expert_threshold"],
            "balance.policy=expert_threshold sets a threshold for each expert, which",
        ),
        (["router.selection=expert_threshold"], "router.selection=expert_threshold needs the thresholds that"),
        ([*UNIFORM, "balance.orthogonality_loss=0.1"], "balance.orthogonality_loss=0.1 trains scores that"),
        (["router.threshold=1"], "router.threshold=1 should be less than 1;"),
    ],
)
def test_fields_that_do_not_fit_are_refused(overrides: list[str], fault: str) -> None:
    found = faults(*overrides)
    assert any(line.startswith(fault) for line in found), found


@pytest.mark.parametrize("name", ["softmax_selected", "normalize", "max_experts"])
def test_trap_T18_a_single_expert_whose_weight_is_always_1_is_refused(name: str) -> None:
    single = {
        "softmax_selected": [
            "router.score=softmax_selected",
            "model.config.num_experts_per_tok=1",
            "model.config.norm_topk_prob=false",
        ],
        "normalize": [TOP_1],
        "max_experts": [*THRESHOLD, "router.max_experts=1", "router.normalize=true"],
    }[name]
    assert any("so the router cannot learn" in line for line in faults(*single))


def test_what_is_left_out_is_filled_in() -> None:
    config = resolve(load_config(DEBUG, THRESHOLD), 1).config
    assert config.router.max_experts == 12
    assert config.router.normalize is False, "the paper's, and not the family's for its top-K"
    assert config.router.scaling_factor == 1.0
    top_k = resolve(load_config(DEBUG), 1).config.router
    assert (top_k.max_experts, top_k.normalize) == (None, True)
