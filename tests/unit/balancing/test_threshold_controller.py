"""The controller of the threshold: on peaked and flat probabilities, from every start, and at unreachable targets."""

import pytest
import torch

from dist_moe.balancing.threshold_controller import MAX_THRESHOLD, control, start_controller
from dist_moe.moe.select import ThresholdRouting, select_by_threshold


def run(sharpness: float, target: float, start: float, experts: int = 16, steps: int = 60) -> list[float]:
    """The mean number of experts in each step, over fresh tokens."""
    generator = torch.Generator().manual_seed(0)
    state, rule, means = start_controller(start), ThresholdRouting(start, experts), []
    for _ in range(steps):
        logits_TE = sharpness * torch.randn(2048, experts, generator=generator)
        ids_TK = select_by_threshold(logits_TE, rule, state.threshold).ids_TK
        means.append(float((ids_TK >= 0).sum()) / len(ids_TK))
        state = control(state, means[-1], target)
    return means


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("target", [1.5, 2.0, 6.0])
@pytest.mark.parametrize("start", [0.1, 0.4, 0.9])
def test_the_mean_reaches_the_target_within_two_percent(sharpness: float, target: float, start: float) -> None:
    tail = run(sharpness, target, start)[-20:]
    assert sum(tail) / len(tail) == pytest.approx(target, rel=0.02)
    assert max(abs(mean - target) for mean in tail) < 0.06 * target, "it does not swing"


def test_the_integral_does_not_wind_up_at_an_unreachable_target() -> None:
    """One expert always reaches the threshold; once the tokens change, the controller recovers in a few steps."""
    state = start_controller(0.4)
    for _ in range(500):
        state = control(state, measured=1.0, target=2.0)
    assert state.threshold == pytest.approx(MAX_THRESHOLD)
    below = 0
    while state.threshold > 0.9:
        state = control(state, measured=4.0, target=2.0)
        below += 1
    assert below < 30


def test_the_threshold_rises_where_tokens_take_too_few() -> None:
    state = start_controller(0.4)
    assert control(state, 1.0, 2.0).threshold > 0.4 > control(state, 3.0, 2.0).threshold
    assert control(state, 2.0, 2.0).threshold == pytest.approx(0.4)
