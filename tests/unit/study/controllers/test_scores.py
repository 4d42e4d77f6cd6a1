"""Tests of the random scores: equal for equal arguments, drifting slowly, drawn again at the shift."""

import pytest
import torch

from dist_moe.study.controllers.scores import Drift, ScoreBatch, draw_scores

DRIFT = Drift(offset_std=0.3, walk_std=0.01, noise_std=2.0)


def draw(tokens: int = 3, shift_at: int = 4, seed: int = 1, experts: int = 2000) -> list[ScoreBatch]:
    return list(draw_scores(DRIFT, experts, tokens, steps=6, shift_at=shift_at, seed=seed))


def test_scores_depend_on_seed_and_experts_only() -> None:
    for first, second in zip(draw(), draw(), strict=True):
        assert torch.equal(first.logits_TE, second.logits_TE)
    assert not torch.equal(draw()[0].offset_E, draw(seed=2)[0].offset_E)
    assert not torch.equal(draw(experts=8)[0].offset_E, draw(experts=9)[0].offset_E[:8])


def test_offsets_do_not_depend_on_the_tokens() -> None:
    for first, second in zip(draw(tokens=3), draw(tokens=5), strict=True):
        assert torch.equal(first.offset_E, second.offset_E)


def test_offsets_walk_slowly_and_are_drawn_again_only_at_the_shift() -> None:
    offsets_SE = torch.stack([scores.offset_E for scores in draw()])
    moved = offsets_SE.diff(dim=0).std(dim=1).tolist()
    walk, shift = pytest.approx(0.01, rel=0.1), pytest.approx(0.3 * 2**0.5, rel=0.1)
    assert moved == [walk, walk, walk, shift, walk]
    assert offsets_SE.std(dim=1).tolist() == [pytest.approx(0.3, rel=0.1)] * 6


def test_logits_are_the_sum_of_offsets_and_noise() -> None:
    scores = draw(tokens=50)[0]
    assert torch.equal(scores.logits_TE, scores.noise_TE + scores.offset_E)
    assert float(scores.noise_TE.std()) == pytest.approx(2.0, rel=0.05)
    first, second = draw(tokens=50)[:2]
    assert not torch.equal(first.noise_TE, second.noise_TE)
