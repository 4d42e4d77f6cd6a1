"""Tests of the color scale: it is fixed, and shows loads of up to five times the mean."""

import itertools

import numpy as np
import pytest

from dist_moe.observe.pictures.scale import (
    ABOVE_RGB,
    EMPTY_RGB,
    MAX_RATIO,
    NO_TOKENS_RGB,
    TICKS,
    colors,
    position,
    ratio_at,
    scale_colors,
)


def color(ratio: float) -> tuple[int, ...]:
    return tuple(colors(np.array(ratio)).tolist())


def test_trap_T74_loads_up_to_five_times_the_mean_look_different() -> None:
    found = [np.array(color(ratio), dtype=int) for ratio in (0.0, 0.1, 0.5, 0.9, 1.0, 1.2, 2.0, 3.0, 4.0, 5.0, 5.1)]
    for first, second in itertools.pairwise(found):
        assert np.abs(first - second).sum() >= 20


def test_the_mean_is_near_white_less_is_blue_and_more_is_red() -> None:
    assert min(color(1.0)) > 230
    red, _, blue = color(0.2)
    assert blue > red + 50
    red, _, blue = color(2.5)
    assert red > blue + 80


def test_what_is_not_on_the_scale_has_a_color_of_its_own() -> None:
    assert color(0.0) == NO_TOKENS_RGB
    assert color(MAX_RATIO + 1e-6) == color(60.0) == ABOVE_RGB
    assert color(float("nan")) == EMPTY_RGB
    on_the_scale = {tuple(rgb) for rgb in scale_colors(np.linspace(0, 1, 1001)).tolist()}
    assert not on_the_scale & {NO_TOKENS_RGB, ABOVE_RGB, EMPTY_RGB}


def test_positions_are_even_in_the_logarithm_and_have_an_inverse() -> None:
    assert position(np.array([0.0, 1.0, MAX_RATIO])).tolist() == pytest.approx([0.0, np.log(2) / np.log(6), 1.0])
    assert ratio_at(position(np.array(TICKS))).tolist() == pytest.approx(list(TICKS))
