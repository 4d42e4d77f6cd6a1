"""The picture of the load: colours, places, and sizes that an eye can use."""

import numpy as np
import pytest

from dist_moe.observe.heatmap import CELL_PX, colours, draw_load

DEAD = [0, 0, 0]


def cell(image: np.ndarray, layer: int, expert: int) -> list[int]:
    """The colour in the middle of a cell; the first pixel that is no margin or text is the first cell's."""
    margin = image[0, 0]
    is_cell = (image != margin).any(axis=-1) & (image != 255).any(axis=-1)
    top, left = np.argwhere(is_cell)[0]
    return image[top + layer * CELL_PX + CELL_PX // 2, left + expert * CELL_PX + CELL_PX // 2].tolist()


def test_each_cell_has_the_colour_of_its_own_expert_and_layer() -> None:
    loads = [[30, 10, 20], [20, 20, 20], [1, 59, 0]]
    image = draw_load(loads)
    assert image.dtype == np.uint8 and image.shape[2] == 3
    for layer, row in enumerate(loads):
        for expert, count in enumerate(row):
            expected = DEAD if count == 0 else colours(np.array(count / 20)).tolist()
            assert cell(image, layer, expert) == expected, (layer, expert)


def test_the_scale_is_fixed_and_each_layer_is_measured_by_its_own_mean() -> None:
    assert draw_load([[1, 3], [100, 300]]).tolist() == draw_load([[2, 6], [7, 21]]).tolist()
    beyond = colours(np.array([2.0, 2.5, 60.0]))
    assert (beyond == beyond[0]).all()
    blue, white, red = colours(np.array([0.0, 1.0, 2.0])).astype(int)
    assert blue[2] > blue[0] + 80 and red[0] > red[2] + 80 and white.min() > 230


def test_cells_are_large_enough_to_see() -> None:
    assert CELL_PX >= 12
    height, width, _ = draw_load([[1] * 64] * 27).shape
    assert height >= 27 * CELL_PX and width >= 64 * CELL_PX


def test_a_layer_with_fewer_experts_leaves_the_margin_showing() -> None:
    loads = [[5, 5, 5, 5], [5, 5]]
    image = draw_load(loads)
    assert cell(image, 1, 1) == colours(np.array(1.0)).tolist()
    assert cell(image, 1, 2) == image[0, 0].tolist() != DEAD


def test_a_layer_without_tokens_is_black() -> None:
    loads = [[3, 3], [0, 0]]
    assert cell(draw_load(loads), 1, 0) == cell(draw_load(loads), 1, 1) == DEAD


def test_every_layer_and_expert_number_fits_in_the_picture() -> None:
    for layers, experts in ((1, 1), (2, 11), (120, 3), (2, 256)):
        image = draw_load([[1] * experts] * layers)
        assert (image[:, 0] == image[0, 0]).all() and (image[:, -1] == image[0, 0]).all()
        assert (image[-1] == image[0, 0]).all()


@pytest.mark.parametrize("loads", [[], [[]], [[], []]])
def test_nothing_to_draw_is_refused(loads: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="no expert; a picture needs one"):
        draw_load(loads)
