"""Routing values under which the router could not learn are refused."""

import pytest

from tests.unit.config.files import debug, qwen, violations


def test_trap_T18_weights_normalized_over_one_expert_are_refused() -> None:
    """s / s is 1 for any s: no gradient reaches the gate."""
    found = violations(debug("model.config.num_experts_per_tok=1"))
    assert str(found["model.config.norm_topk_prob"]).endswith("set it to false, or top_k above 1")
    assert "router.normalize" in violations(qwen("model.config.num_experts_per_tok=1", "router.normalize=true"))


@pytest.mark.parametrize("normalize", ["false", "true"])
def test_one_expert_whose_weight_is_its_score_is_fine(normalize: str) -> None:
    top_k = 1 if normalize == "false" else 2
    overrides = [f"model.config.num_experts_per_tok={top_k}", f"model.config.norm_topk_prob={normalize}"]
    assert violations(debug(*overrides)) == {}
