"""A heat map of the load: one row per layer, one column per expert, colored by load / mean load of the layer.

The color scale is fixed, so that images of different steps and runs can be compared: 0 is blue, 1 (the mean) is near
white, 2 and above is red. An expert without tokens is black. Pillow draws it in milliseconds; matplotlib takes 150 ms
of every logged step, and half a second to import.

Shapes: L layers, E experts of the largest layer, H by W pixels.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

CELL_PX = 18  # height of a cell; its width too, up to 88 experts
MAX_RATIO = 2.0  # upper end of the color scale, in units of the mean load

_GAP_PX = 1
_PADDING_PX = 10
_FONT_PX = 13
_LINE_PX = 18
_SCALE_WIDTH_PX = 220
_MIN_WIDTH_PX = 400  # room for the title and the legend
_MAX_CELLS_WIDTH_PX, _MIN_CELL_WIDTH_PX = 1600, 4
_BACKGROUND_RGB = (255, 255, 255)
_TEXT_RGB = (40, 40, 40)
_DEAD_RGB = (0, 0, 0)
_STOPS = (0.0, 0.5, 1.0, 1.5, MAX_RATIO)
_STOP_RGB = ((33, 60, 150), (120, 165, 215), (247, 247, 247), (240, 140, 100), (165, 0, 35))
_TITLE = "Load of each expert, relative to the mean of its layer"

Pixels = NDArray[np.uint8]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class _Frame(NamedTuple):
    """An image without cells, and where the first cell begins."""

    pixels: Pixels
    left: int
    top: int


def draw_load(load: Sequence[Sequence[int]]) -> Pixels:
    """Draw the load of every layer.

    Args:
        load: [L][E] assignments; layers may differ in E.

    Returns:
        [H, W, 3] uint8, with a title, numbered axes, and a legend.

    Raises:
        ValueError: There is no layer or no expert to draw.
    """
    experts = max((len(row) for row in load), default=0)
    if experts == 0:
        raise ValueError(f"the load has {len(load)} layers and no expert; a heat map needs an MoE model")
    frame = _draw_frame(len(load), experts)
    pixels, width = frame.pixels.copy(), cell_width_px(experts)
    for layer, row in enumerate(load):
        y = frame.top + layer * CELL_PX
        cells = np.repeat(load_colors(row), width, axis=0)
        cells[width - _GAP_PX :: width] = _BACKGROUND_RGB
        pixels[y : y + CELL_PX - _GAP_PX, frame.left : frame.left + len(cells)] = cells
    return pixels


@functools.lru_cache(maxsize=4)
def _draw_frame(layers: int, experts: int) -> _Frame:
    """Draw what is the same in every step: title, axes and legend."""
    font = ImageFont.load_default(_FONT_PX)
    left = _PADDING_PX + int(font.getlength(f"layer {layers - 1}")) + 6
    top = _PADDING_PX + 2 * _LINE_PX
    cell_width = cell_width_px(experts)
    width = max(left + experts * cell_width + _PADDING_PX, _MIN_WIDTH_PX)
    bottom = top + layers * CELL_PX
    image = Image.new("RGB", (width, bottom + 8 + CELL_PX + _LINE_PX + _PADDING_PX), _BACKGROUND_RGB)
    draw = ImageDraw.Draw(image)
    draw.text((_PADDING_PX, _PADDING_PX - 4), _TITLE, _TEXT_RGB, font)
    _draw_axes(draw, font, layers, experts, left, top)
    _draw_legend(draw, font, _PADDING_PX, bottom + 8)
    return _Frame(np.array(image), left, top)


def cell_width_px(experts: int) -> int:
    """Return the width of a cell: narrower with many experts, so that the image fits a screen."""
    return max(_MIN_CELL_WIDTH_PX, min(CELL_PX, _MAX_CELLS_WIDTH_PX // experts))


def colors(ratio: NDArray[np.float64]) -> Pixels:
    """Map load / mean load to colors.

    Args:
        ratio: [...] float64, at least 0; values above 2 get the color of 2.

    Returns:
        [..., 3] uint8.
    """
    channels = np.array(_STOP_RGB, dtype=np.float64).T
    mixed = np.stack([np.interp(ratio, _STOPS, channel) for channel in channels], axis=-1)
    return np.rint(mixed).astype(np.uint8)


def load_colors(load: Sequence[int]) -> Pixels:
    """Return the colors of one layer's experts, [E, 3] uint8."""
    counts_E = np.asarray(load, dtype=np.float64)
    mean = counts_E.mean() if counts_E.size else 0.0
    colors_E3 = colors(counts_E / mean if mean > 0 else counts_E)
    colors_E3[counts_E == 0] = _DEAD_RGB
    return colors_E3


def _draw_axes(draw: ImageDraw.ImageDraw, font: Font, layers: int, experts: int, left: int, top: int) -> None:
    for layer in range(layers):
        middle = top + layer * CELL_PX + CELL_PX // 2
        draw.text((left - 6, middle), f"layer {layer}", _TEXT_RGB, font, anchor="rm")
    draw.text((left - 6, top - _LINE_PX // 2), "expert", _TEXT_RGB, font, anchor="rm")
    # Number every cell while the numbers fit, then every second, fourth, eighth ...
    cell_width, step = cell_width_px(experts), 1
    while step * cell_width < font.getlength(str(experts - 1)) + 4:
        step *= 2
    for expert in range(0, experts, step):
        middle = left + expert * cell_width + cell_width // 2
        draw.text((middle, top - _LINE_PX // 2), str(expert), _TEXT_RGB, font, anchor="mm")


def _draw_legend(draw: ImageDraw.ImageDraw, font: Font, left: int, top: int) -> None:
    """Draw the color scale with its numbers below it, and the color of an expert without tokens."""
    for offset, color in enumerate(colors(np.linspace(0.0, MAX_RATIO, _SCALE_WIDTH_PX)).tolist()):
        draw.line([(left + offset, top), (left + offset, top + CELL_PX - 1)], tuple(color))
    marks = ((0, "0", "la"), (_SCALE_WIDTH_PX // 2, "1 x mean", "ma"), (_SCALE_WIDTH_PX, "2 or more", "ra"))
    for offset, text, anchor in marks:
        draw.text((left + offset, top + CELL_PX + 2), text, _TEXT_RGB, font, anchor=anchor)
    dead = left + _SCALE_WIDTH_PX + 20
    _fill(draw, dead, top, CELL_PX, CELL_PX, _DEAD_RGB)
    draw.text((dead + CELL_PX + 6, top + CELL_PX // 2), "no tokens", _TEXT_RGB, font, anchor="lm")


def _fill(draw: ImageDraw.ImageDraw, x: int, y: int, width: int, height: int, color: tuple[int, ...]) -> None:
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=color)
