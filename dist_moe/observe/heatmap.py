"""A picture of the load: one row per layer, one column per expert, coloured by load / mean load.

The colours are fixed, so pictures of different steps and runs compare: 0 is blue, 1 (the mean) is near white,
2 and above is red. An expert without a token is black; where a layer has no such expert, it stays grey.
Shapes: L layers, E experts of the largest layer, H by W pixels, C the three colours.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

CELL_PX = 16
TOP_OF_SCALE = 2.0  # times the mean load

_GAP_PX = 1
_TEXT_SCALE = 2
_MARGIN_RGB = (90, 90, 90)
_DEAD_RGB = (0, 0, 0)
_TEXT_RGB = (255, 255, 255)
_STOPS = (0.0, 0.5, 1.0, 1.5, TOP_OF_SCALE)
_STOP_RGB = ((33, 60, 150), (120, 165, 215), (247, 247, 247), (240, 140, 100), (165, 0, 35))
# 3 by 5 pixel figures, one three-bit row each, from the top.
_FIGURES = {
    "0": (7, 5, 5, 5, 7),
    "1": (2, 6, 2, 2, 7),
    "2": (7, 1, 7, 4, 7),
    "3": (7, 1, 7, 1, 7),
    "4": (5, 5, 7, 1, 1),
    "5": (7, 4, 7, 1, 7),
    "6": (7, 4, 7, 5, 7),
    "7": (7, 1, 1, 2, 2),
    "8": (7, 5, 7, 5, 7),
    "9": (7, 5, 7, 1, 7),
    "x": (0, 5, 2, 5, 0),
}
_FIGURE_WIDTH = 4  # with the gap after it
_FIGURE_HEIGHT = 5

Image = NDArray[np.uint8]


def draw_load(load: Sequence[Sequence[int]]) -> Image:
    """Draw the load of every layer.

    Args:
        load: [L][E] assignments; layers may differ in E.

    Returns:
        [H, W, 3] uint8. Layer numbers stand at the left, expert numbers on top, and the colour scale below,
        marked 0x, 1x and 2x the layer's mean.

    Raises:
        ValueError: there is no layer or no expert to draw.
    """
    experts = max((len(row) for row in load), default=0)
    if experts == 0:
        raise ValueError(f"the load has {len(load)} layers and no expert; a picture needs one; draw MoE models only")
    text_height = _FIGURE_HEIGHT * _TEXT_SCALE
    left = max(_text_width(str(len(load) - 1)) + 6, CELL_PX)
    top = text_height + 8
    scale_top = top + len(load) * CELL_PX + 8
    scale_width = max(experts * CELL_PX, 96)
    height = scale_top + CELL_PX + 4 + text_height + 6
    image = np.empty((height, left + scale_width + 14, 3), dtype=np.uint8)
    image[:] = _MARGIN_RGB
    for layer, row in enumerate(load):
        y = top + layer * CELL_PX
        _write(image, y + (CELL_PX - text_height) // 2, left - 4 - _text_width(str(layer)), str(layer))
        for expert, colour in enumerate(_row_colours(row)):
            x = left + expert * CELL_PX
            image[y : y + CELL_PX - _GAP_PX, x : x + CELL_PX - _GAP_PX] = colour
    # Every fourth number where there are many experts, so that numbers of two and three figures stay apart.
    for expert in range(0, experts, 1 if experts <= 10 else 4):
        _write(image, 4, left + expert * CELL_PX + 4, str(expert))
    _draw_scale(image, scale_top, left, scale_width)
    return image


def colours(ratio: NDArray[np.float64]) -> Image:
    """Colours of load / mean load.

    Args:
        ratio: [...] float64, 0 and above; values above 2 look like 2.

    Returns:
        [..., 3] uint8.
    """
    channels = np.array(_STOP_RGB, dtype=np.float64).T
    mixed = np.stack([np.interp(ratio, _STOPS, channel) for channel in channels], axis=-1)
    return np.rint(mixed).astype(np.uint8)


def _row_colours(row: Sequence[int]) -> Image:
    counts_E = np.asarray(row, dtype=np.float64)
    mean = counts_E.mean() if counts_E.size else 0.0
    painted = colours(counts_E / mean if mean > 0 else counts_E)
    painted[counts_E == 0] = _DEAD_RGB
    return painted


def _draw_scale(image: Image, top: int, left: int, width: int) -> None:
    image[top : top + CELL_PX, left : left + width] = colours(np.linspace(0.0, TOP_OF_SCALE, width))
    marks = ((0, "0x"), ((width - _text_width("1x")) // 2, "1x"), (width - _text_width("2x"), "2x"))
    for offset, text in marks:
        _write(image, top + CELL_PX + 4, left + offset, text)


def _text_width(text: str) -> int:
    return len(text) * _FIGURE_WIDTH * _TEXT_SCALE - _TEXT_SCALE


def _write(image: Image, top: int, left: int, text: str) -> None:
    for place, figure in enumerate(text):
        x = left + place * _FIGURE_WIDTH * _TEXT_SCALE
        bits = np.array([[row >> shift & 1 for shift in (2, 1, 0)] for row in _FIGURES[figure]], dtype=bool)
        mask = bits.repeat(_TEXT_SCALE, axis=0).repeat(_TEXT_SCALE, axis=1)
        image[top : top + mask.shape[0], x : x + mask.shape[1]][mask] = _TEXT_RGB
