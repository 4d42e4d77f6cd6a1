"""Random routing: the distribution of the drawn experts, and that the same logits draw the same ones."""

import pytest
import torch

from dist_moe.moe.router import Router
from dist_moe.moe.select import RandomRouting, select

LOGITS_TE = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
BIAS_E = torch.zeros(8)


def load_of(rule: RandomRouting) -> torch.Tensor:
    """Assignments of each expert."""
    return select(LOGITS_TE, rule, BIAS_E).ids_TK.flatten().bincount(minlength=8)


def test_uniform_routing_is_even_within_chance() -> None:
    load_E = load_of(RandomRouting(top_k=2, zipf_exponent=0.0, score="softmax"))
    assert int(load_E.sum()) == 8000
    assert (load_E - 1000).abs().max() < 4 * 1000**0.5


@pytest.mark.parametrize("zipf_exponent", [0.5, 1.0, 2.0])
def test_zipf_has_its_exponent(zipf_exponent: float) -> None:
    load_E = load_of(RandomRouting(top_k=1, zipf_exponent=zipf_exponent, score="softmax")).double()
    slope = torch.log(load_E[0] / load_E[3]) / torch.log(torch.tensor(4.0))
    assert float(slope) == pytest.approx(zipf_exponent, abs=0.15)


def test_a_token_takes_different_experts_and_their_scores() -> None:
    routing = select(LOGITS_TE, RandomRouting(top_k=3, zipf_exponent=1.0, score="softmax"), BIAS_E)
    assert all(len(set(ids)) == 3 for ids in routing.ids_TK.tolist())
    assert torch.equal(routing.weights_TK, LOGITS_TE.softmax(dim=1).gather(1, routing.ids_TK))


def test_trap_T02_the_same_experts_are_drawn_again_and_the_random_state_is_left_alone() -> None:
    rule = RandomRouting(top_k=2, zipf_exponent=1.0, score="sigmoid")
    before = torch.get_rng_state()
    first, again = (select(LOGITS_TE, rule, BIAS_E).ids_TK for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_drawn_experts_depend_on_the_token_and_not_on_its_position() -> None:
    """So a batch divided among ranks and micro-batches has the same load as the undivided one."""
    rule = RandomRouting(top_k=2, zipf_exponent=0.0, score="softmax")
    whole = select(LOGITS_TE, rule, BIAS_E).ids_TK
    parts = [select(part, rule, BIAS_E).ids_TK for part in LOGITS_TE.split(500)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(parts[0], parts[1])


def test_trap_T17_a_random_router_is_not_balanced() -> None:
    assert not Router(8, 4, RandomRouting(top_k=2, zipf_exponent=0.0, score="softmax")).is_balanced
