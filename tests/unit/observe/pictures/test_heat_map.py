"""Tests of the frame around a heat map: nothing is cut off or drawn over, and every axis is labeled."""

import numpy as np
import pytest

from dist_moe.observe.pictures.canvas import BACKGROUND_RGB, LINE_PX, text_width, wrap
from dist_moe.observe.pictures.heat_map import PADDING_PX, Axes, draw_heat_map
from dist_moe.observe.pictures.scale import ABOVE_RGB, NO_TOKENS_RGB, colors, scale_colors


def dark(pixels: np.ndarray) -> bool:
    return bool((pixels < 128).all(axis=-1).any())


def test_title_axes_and_scale_are_drawn() -> None:
    axes = Axes("layer", "expert", range(8), 18, 18)
    picture = draw_heat_map("A title", np.ones((4, 8)), axes, "a name")
    pixels, top, left = picture.pixels, picture.top, picture.left
    bottom = top + 4 * picture.cell_height
    assert dark(pixels[: top - 2]), "title"
    assert dark(pixels[top:bottom, PADDING_PX + LINE_PX : left - 1]), "row numbers"
    assert dark(pixels[top:bottom, : PADDING_PX + LINE_PX]), "name of the rows"
    line = pixels[bottom : bottom + LINE_PX + 2]
    cells = [line[:, left + column * 18 : left + column * 18 + 18] for column in range(8)]
    assert all(map(dark, cells)) and dark(line[:, : left - 8]), "each column is numbered, after the name of the axis"
    legend = pixels[bottom + LINE_PX + 2 :]
    for color in (NO_TOKENS_RGB, ABOVE_RGB, *scale_colors(np.array([0.0, 1.0])).tolist()):
        assert (legend == color).all(axis=-1).any()
    assert dark(legend[-LINE_PX - PADDING_PX :, left:]), "name of the scale"
    edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (edges == BACKGROUND_RGB).all()


@pytest.mark.parametrize(("rows", "columns", "width", "height"), [(1, 1, 18, 18), (60, 256, 6, 10), (256, 256, 1, 1)])
def test_every_cell_has_the_color_of_its_value(rows: int, columns: int, width: int, height: int) -> None:
    ratio_RC = np.random.default_rng(0).uniform(0.01, 6.0, (rows, columns))
    picture = draw_heat_map("", ratio_RC, Axes("r", "c", range(columns), width, height), "")
    found = [[picture.color(row, column) for column in range(columns)] for row in range(rows)]
    assert np.array_equal(np.array(found), colors(ratio_RC))


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_the_name_of_the_axis_fits_next_to_few_rows(rows: int) -> None:
    picture = draw_heat_map("", np.ones((rows, 8)), Axes("MoE layer", "expert", range(8), 9, 9), "")
    assert rows * picture.cell_height >= text_width("MoE layer")
    assert (picture.pixels[: picture.top - 2] == BACKGROUND_RGB).all(), "nothing is written where the title would be"


def test_long_texts_take_more_lines_and_move_the_map_down() -> None:
    words = "load of each expert over the steps " * 4
    assert " ".join(wrap(words, 300)) == words.strip() and max(map(text_width, wrap(words, 300))) <= 300
    assert wrap("", 300) == [] and wrap("one", 1) == ["one"]
    axes = Axes("r", "c", range(4), 9, 9)
    short, long = (draw_heat_map(text, np.ones((2, 4)), axes, text) for text in ("one line", words))
    assert long.pixels.shape[1] == short.pixels.shape[1], "only the height grows"
    assert long.top >= short.top + LINE_PX and long.color(1, 3) == short.color(1, 3)
    assert (long.pixels[:, -1] == BACKGROUND_RGB).all(), "no text is cut off"
