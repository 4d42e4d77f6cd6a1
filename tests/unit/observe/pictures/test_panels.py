"""Tests of the frame around heat maps: nothing is cut off or drawn over, and every axis is labeled."""

import numpy as np
import pytest

from dist_moe.observe.pictures.canvas import BACKGROUND_RGB
from dist_moe.observe.pictures.panels import Axes, Panel, draw_panels
from dist_moe.observe.pictures.scale import ABOVE_RGB, NO_TOKENS_RGB, colors, scale_colors


def dark(pixels: np.ndarray) -> bool:
    return bool((pixels < 128).all(axis=-1).any())


def test_title_axes_and_scale_are_drawn() -> None:
    axes = Axes("layer", "expert", range(8), 18, 18)
    picture = draw_panels("A title", [Panel("one", np.ones((4, 8))), Panel("two", np.ones((4, 8)))], axes, "a name")
    pixels, (first, second), left = picture.pixels, picture.tops, picture.left
    assert dark(pixels[: first - 20]), "title"
    for top in (first, second):
        assert dark(pixels[top - 18 : top - 2, left:]), "title of the panel"
        assert dark(pixels[top : top + 72, 16 : left - 1]), "row numbers"
        assert dark(pixels[top : top + 72, :24]), "name of the rows"
    bottom = second + 4 * 18
    assert dark(pixels[bottom : bottom + 18, left:]) and dark(pixels[bottom + 18 : bottom + 36, left:]), "columns"
    legend = pixels[bottom + 36 :]
    for color in (NO_TOKENS_RGB, ABOVE_RGB, *scale_colors(np.array([0.0, 1.0])).tolist()):
        assert (legend == color).all(axis=-1).any()
    edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (edges == BACKGROUND_RGB).all()


@pytest.mark.parametrize(("rows", "columns", "width", "height"), [(1, 1, 18, 18), (60, 256, 6, 10), (256, 256, 1, 1)])
def test_every_cell_has_the_color_of_its_value(rows: int, columns: int, width: int, height: int) -> None:
    ratio_RC = np.random.default_rng(0).uniform(0.01, 6.0, (rows, columns))
    picture = draw_panels("", [Panel("", ratio_RC)], Axes("r", "c", range(columns), width, height), "")
    found = [[picture.color(0, row, column) for column in range(columns)] for row in range(rows)]
    assert np.array_equal(np.array(found), colors(ratio_RC))


def test_panels_may_have_different_numbers_of_rows() -> None:
    picture = draw_panels("", [Panel("", np.ones((8, 2))), Panel("", np.zeros((2, 2)))], Axes("", "", (1, 2), 9, 9), "")
    assert picture.color(1, 1, 1) == NO_TOKENS_RGB != picture.color(0, 7, 1)
