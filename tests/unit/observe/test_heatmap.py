"""Tests of the heat map of the load: colors, positions, and a size that is legible."""

import numpy as np
import pytest

from dist_moe.observe.heatmap import CELL_PX, cell_width_px, colors, draw_load, load_colors

BACKGROUND, DEAD = [255, 255, 255], [0, 0, 0]


def first_cell(image: np.ndarray) -> tuple[int, int]:
    """Return the top left pixel of the first cell of a load whose first expert has no tokens."""
    square = np.lib.stride_tricks.sliding_window_view((image == DEAD).all(axis=-1), (CELL_PX - 1, CELL_PX - 1))
    top, left = np.argwhere(square.all(axis=(2, 3)))[0]
    return int(top), int(left)


def cell(image: np.ndarray, layer: int, expert: int) -> list[int]:
    """Return the color in the middle of a cell."""
    top, left = first_cell(image)
    color: list[int] = image[top + layer * CELL_PX + CELL_PX // 2, left + expert * CELL_PX + CELL_PX // 2].tolist()
    return color


def test_each_cell_has_the_color_of_its_own_expert_and_layer() -> None:
    loads = [[0, 40, 20], [20, 20, 20], [1, 59, 0]]
    image = draw_load(loads)
    assert image.dtype == np.uint8 and image.shape[2] == 3
    for layer, row in enumerate(loads):
        for expert, count in enumerate(row):
            expected = DEAD if count == 0 else colors(np.array(count / 20)).tolist()
            assert cell(image, layer, expert) == expected, (layer, expert)


def test_the_scale_is_fixed_and_relative_to_the_mean_of_each_layer() -> None:
    assert draw_load([[1, 3], [100, 300]]).tolist() == draw_load([[2, 6], [7, 21]]).tolist()
    above = colors(np.array([2.0, 2.5, 60.0]))
    assert (above == above[0]).all()
    blue, white, red = colors(np.array([0.0, 1.0, 2.0])).astype(int)
    assert blue[2] > blue[0] + 80 and red[0] > red[2] + 80 and white.min() > 230


def test_title_axes_and_legend_are_drawn() -> None:
    image = draw_load([[0, 4, 4, 4]] * 2)
    top, left = first_cell(image)
    dark = np.asarray((image < 128).all(axis=-1))
    assert dark[: top - 20].any(), "title"
    assert dark[top - 20 : top, left:].any(), "expert numbers"
    assert dark[top : top + 2 * CELL_PX, : left - 1].any(), "layer numbers"
    legend = image[top + 2 * CELL_PX :]
    for color in (DEAD, *colors(np.array([0.0, 2.0])).tolist()):
        assert (legend == color).all(axis=-1).any(), "legend"


def test_cells_are_large_enough_to_see_and_wide_loads_fit_a_screen() -> None:
    assert CELL_PX >= 12
    height, width, _ = draw_load([[1] * 64] * 27).shape
    assert height >= 27 * CELL_PX and width >= 64 * CELL_PX
    assert cell_width_px(256) >= 4 and draw_load([[1] * 256]).shape[1] < 1700


def test_a_layer_with_fewer_experts_leaves_the_background() -> None:
    image = draw_load([[0, 5, 5, 5], [5, 5]])
    assert cell(image, 1, 1) == colors(np.array(1.0)).tolist()
    assert cell(image, 1, 2) == BACKGROUND


def test_a_layer_without_tokens_is_black() -> None:
    assert load_colors([0, 0]).tolist() == [DEAD, DEAD]


def test_numbers_and_legend_fit_in_the_image() -> None:
    for layers, experts in ((1, 1), (2, 11), (120, 3), (2, 256)):
        image = draw_load([[1] * experts] * layers)
        for border in (image[:, 0], image[:, -1], image[0], image[-1]):
            assert (border == BACKGROUND).all(), (layers, experts)


@pytest.mark.parametrize("loads", [[], [[]], [[], []]])
def test_a_load_without_experts_is_rejected(loads: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="no expert; a heat map needs an MoE model"):
        draw_load(loads)
