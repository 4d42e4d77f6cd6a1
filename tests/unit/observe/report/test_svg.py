"""Tests of the charts: axes, gaps, many points, and what is drawn."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_moe.observe.report.map_svg import spread
from dist_moe.observe.report.svg import Chart, Line, draw, legend, log_ticks, thinned, tick_text, ticks

FINITE = st.floats(-1e12, 1e12, allow_nan=False)


def chart(*points: tuple[float, float | None], log: bool = False, from_zero: bool = False) -> Chart:
    return Chart("a", "A", "An a.", [Line("a", "run-0", points)], log=log, from_zero=from_zero)


def path_of(made: Chart) -> list[tuple[str, float, float]]:
    (path,) = re.findall(r'<path class="line [^"]*" d="([^"]*)"', draw(made))
    return [(kind, float(x), float(y)) for kind, x, y in re.findall(r"([ML])([-\d.]+) ([-\d.]+)", path)]


@given(FINITE, st.floats(1e-9, 1e12))
def test_ticks_are_round_few_and_inside(low: float, size: float) -> None:
    high = low + size
    if not high > low * (1 + 1e-9 * math.copysign(1, low)):
        return
    found = ticks(low, high)
    slack = 1e-6 * size + 1e-12 * max(abs(low), abs(high))
    assert len(found) <= 8 and all(low - slack <= tick <= high + slack for tick in found)


def test_ticks_of_steps_are_whole_and_those_of_a_log_scale_1_2_5() -> None:
    assert ticks(1, 4, whole=True) == [1, 2, 3, 4] and ticks(0, 300) == [0, 50, 100, 150, 200, 250, 300]
    assert log_ticks(0.03, 3) == [0.05, 0.1, 0.2, 0.5, 1, 2]
    assert log_ticks(1e-6, 10) == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1, 10])
    assert len(log_ticks(1e-300, 1e30)) <= 13
    assert [tick_text(value) for value in (0, 0.05, 1500, 2e-5, 1e12)] == ["0", "0.05", "1,500", "2e-05", "1e+12"]


def test_a_curve_is_one_path_from_the_left_to_the_right_with_a_gap_where_a_value_is_missing() -> None:
    found = path_of(chart((1, 1.0), (2, 2.0), (3, None), (4, 4.0), (5, 3.0)))
    assert [kind for kind, _, _ in found] == ["M", "L", "M", "L"]
    xs, ys = [x for _, x, _ in found], [y for _, _, y in found]
    assert xs == sorted(xs) and xs[0] == 62 and xs[-1] == 546
    assert ys[2] == min(ys) and ys[0] == max(ys), "a larger value is higher"


def test_a_scale_is_logarithmic_where_values_spread_and_none_is_zero() -> None:
    wide = [(1, 0.01), (2, 0.1), (3, 1.0)]
    assert chart(*wide, log=True).is_log and not chart(*wide).is_log
    assert not chart(*wide, (4, 0.0), log=True).is_log and not chart((1, 1.0), (2, 2.0), log=True).is_log
    (_, _, first), (_, _, second), (_, _, third) = path_of(chart(*wide, log=True))
    assert first - second == pytest.approx(second - third, abs=0.2), "equal ratios are equal lengths"


def test_one_value_and_equal_values_can_be_drawn() -> None:
    assert 'circle class="dot run-0"' in draw(chart((5, 2.0)))
    for value in (0.0, 1e-30, -7.0, 1e15):
        assert len(path_of(chart((1, value), (2, value), from_zero=True))) == 2
    assert "<path" not in draw(chart())


@given(st.lists(FINITE, min_size=3, max_size=3000))
def test_many_points_are_thinned_to_extremes_that_were_there(values: list[float]) -> None:
    points = [(float(index), value) for index, value in enumerate(values)]
    found = thinned(points, most=100)
    assert len(found) <= 100 and set(found) <= set(points) and found == sorted(found)
    assert found[0] == points[0] and found[-1] == points[-1]
    assert {max(value for _, value in found), min(value for _, value in found)} == {max(values), min(values)}


def test_many_points_at_one_place_are_thinned_to_their_extremes() -> None:
    points = [(2.0, float(number % 97)) for number in range(700)]
    assert thinned(points) == [(2.0, 0.0), (2.0, float(699 % 97)), (2.0, 96.0)]


def test_names_are_escaped() -> None:
    made = Chart("a", "<b>", "", [Line("<i>&", "run-0", [(1, 1.0)])])
    assert "<b>" not in draw(made) and "&lt;i&gt;&amp;" in legend(made.lines)


@given(st.integers(1, 2000), st.integers(2, 20))
def test_labels_of_a_heat_map_are_spread_with_both_ends(count: int, most: int) -> None:
    found = spread(count, most)
    assert found[0] == 0 and found[-1] == count - 1 and len(found) <= most and found == sorted(set(found))
