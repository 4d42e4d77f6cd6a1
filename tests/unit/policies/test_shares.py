"""Target shares of the experts: what the configuration accepts, and that every rule leads to them."""

import pytest
import torch

from dist_moe.balancing.counts import RoutingCounts
from dist_moe.balancing.margins import count_margins
from dist_moe.policies.base import BiasPolicy, RuleState, SharesPolicy
from dist_moe.policies.load_error import load_error
from dist_moe.policies.registry import POLICIES, make_policy
from tests.unit.config.test_balancing import faults

WITH_SHARES = [name for name, policy in POLICIES.items() if issubclass(policy, SharesPolicy)]
THIRDS = (0.5, 0.3, 0.2)


def test_every_policy_that_moves_a_bias_has_shares() -> None:
    assert [name for name, policy in POLICIES.items() if policy.moves_bias] == WITH_SHARES


@pytest.mark.parametrize(
    ("shares", "fault"),
    [
        ("[0.5, 0.5]", "balance.shares=[0.5, 0.5] has 2 values for the 12 experts; give one for each"),
        ("{12: 0.1}", "names '12', which is no expert; use ids from 0 to 11"),
        ("{0: 0}", "has a share that is not above 0;"),
        ("{0: 0.5, 1: 0.5}", "has the sum 1, which leaves nothing for the other experts;"),
        (
            "{0: 0.5}",
            "gives an expert 0.5 of the assignments, and a token takes an expert at most once; give less than",
        ),
        (f"[{', '.join(['0.1'] * 12)}]", "has the sum 1.2; give shares with the sum 1"),
        ("much", "balance.shares=much should be a list or a mapping;"),
    ],
)
def test_shares_that_cannot_be_are_refused(shares: str, fault: str) -> None:
    assert any(fault in line for line in faults(f"balance.shares={shares}"))


def test_shares_are_refused_with_a_loss_that_evens_the_load() -> None:
    found = faults("balance.shares={0: 0.2}", "balance.auxiliary_loss=0.1")
    assert found == [
        "balance.auxiliary_loss=0.1 evens the load, which balance.shares makes uneven; set it to 0, or leave out shares"
    ]


def test_experts_that_a_mapping_leaves_out_share_the_rest() -> None:
    policy = make_policy("loss_free", shares={1: 0.4, "3": 0.2})
    assert policy.target_shares(4) == pytest.approx((0.2, 0.4, 0.2, 0.2))
    assert make_policy("loss_free", shares=list(THIRDS)).target_shares(3) == THIRDS
    assert make_policy("loss_free").target_shares(3) is None and make_policy("none").target_shares(3) is None


def test_the_load_error_is_relative_to_the_target() -> None:
    """Of 100 assignments the targets are 50, 30, 20."""
    assert load_error(torch.tensor([40, 30, 30]), THIRDS).tolist() == pytest.approx([0.2, 0.0, -0.5])
    assert load_error(torch.zeros(3, dtype=torch.int64), THIRDS).tolist() == [0.0, 0.0, 0.0]
    equal_E = load_error(torch.tensor([40, 30, 29]), (1 / 3, 1 / 3, 1 / 3))
    torch.testing.assert_close(equal_E, load_error(torch.tensor([40, 30, 29])))


@pytest.mark.parametrize("name", [name for name in WITH_SHARES if name != "expert_threshold"])
def test_trap_T80_every_rule_leads_to_the_shares(name: str) -> None:
    """On fixed tokens of equal experts; without shares the load would be even from the start."""
    shares = [0.3, 0.2, 0.1, 0.1, 0.1, 0.2]
    policy = make_policy(name, shares=shares)
    assert isinstance(policy, BiasPolicy)
    scores_TE = torch.randn(4000, 6, generator=torch.Generator().manual_seed(0))
    state = RuleState(torch.zeros(6), {kind: torch.zeros(6) for kind in policy.memory})
    for step in range(150):
        load_E = (scores_TE + state.bias_E).topk(2).indices.flatten().bincount(minlength=6)
        margins_EQ = count_margins(scores_TE, state.bias_E, 2) if policy.needs_margins else None
        counts = RoutingCounts(load_E, torch.tensor([0, 4000]), margins_EQ)
        state = policy.next_state(state, counts, 0.1 * 0.97**step)
    assert (load_E / load_E.sum()).tolist() == pytest.approx(shares, abs=0.01)
