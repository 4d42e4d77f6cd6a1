"""A heat map with a title, named and numbered axes, and the color scale below.

TensorBoard shows a picture in a card of about 345 x 215 pixels, and scales larger ones down without smoothing, which
breaks their text. So a picture of up to 256 columns and 128 rows has that size.

Shapes: R rows and C columns of the map.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dist_moe.observe.pictures.canvas import (
    BACKGROUND_RGB,
    LINE_PX,
    TEXT_RGB,
    Pixels,
    text_width,
    wrap,
    write,
    write_upwards,
)
from dist_moe.observe.pictures.scale import (
    ABOVE_RGB,
    MAX_RATIO,
    NO_TOKENS_RGB,
    TICKS,
    colors,
    position,
    scale_colors,
)

PADDING_PX, GAP_PX = 6, 4
SCALE_WIDTH_PX, SCALE_HEIGHT_PX = 130, 12
MIN_INNER_PX = 280  # room for the color scale with its legend, and the texts
MIN_PX_FOR_GRID = 6  # cells at least as high and wide have a line between them


@dataclass(frozen=True)
class Axes:
    """The axes of a map, and the size of its cells.

    Attributes:
        rows, columns: Names of the axes.
        column_numbers: C numbers below the columns; those that do not fit are omitted.
        cell_width, cell_height: Of a cell in pixels. Few rows become higher, so that the name of the axis fits.
        grid: Whether large cells have a line between them.
    """

    rows: str
    columns: str
    column_numbers: Sequence[int]
    cell_width: int
    cell_height: int
    grid: bool = True


class Picture(NamedTuple):
    """A picture, and where its cells are.

    Attributes:
        pixels: [H, W, 3] uint8.
        top, left: The first pixel of the map.
        cell_height, cell_width: Of a cell in pixels.
    """

    pixels: Pixels
    top: int
    left: int
    cell_height: int
    cell_width: int

    def color(self, row: int, column: int) -> tuple[int, ...]:
        """Return the color in the middle of a cell."""
        y = self.top + row * self.cell_height + self.cell_height // 2
        x = self.left + column * self.cell_width + self.cell_width // 2
        return tuple(self.pixels[y, x].tolist())


def draw_heat_map(title: str, ratio_RC: NDArray[np.float64], axes: Axes, scale_name: str) -> Picture:
    """Draw a heat map.

    Args:
        title: Of the picture.
        ratio_RC: [R, C] float64, the load relative to the mean; 0 for no token, NaN for no value.
        axes: Names, numbers and sizes.
        scale_name: What the colors show.
    """
    rows, columns = ratio_RC.shape
    height, width = max(axes.cell_height, math.ceil(text_width(axes.rows) / rows)), axes.cell_width
    first_number = text_width(str(axes.column_numbers[0])) // 2 if axes.column_numbers else 0
    of_rows, of_columns = LINE_PX + text_width(str(rows - 1)), text_width(axes.columns) + first_number
    left = PADDING_PX + max(of_rows, of_columns) + GAP_PX
    inner = max(columns * width, MIN_INNER_PX)
    title_lines, scale_lines = wrap(title, left + inner - PADDING_PX), wrap(scale_name, inner)
    top = PADDING_PX + len(title_lines) * LINE_PX + GAP_PX
    bottom = top + rows * height
    scale_top = bottom + LINE_PX + GAP_PX
    below = SCALE_HEIGHT_PX + (1 + len(scale_lines)) * LINE_PX + PADDING_PX
    image = Image.new("RGB", (left + inner + PADDING_PX, scale_top + below), BACKGROUND_RGB)
    draw = ImageDraw.Draw(image)
    _write_lines(draw, PADDING_PX, PADDING_PX, title_lines)
    _number_rows(draw, rows, height, left, top)
    write_upwards(image, PADDING_PX - 2, (top + bottom) // 2, axes.rows)
    _number_columns(draw, axes, left, bottom, left - first_number - GAP_PX)
    _draw_scale(draw, left, scale_top)
    _write_lines(draw, left, scale_top + SCALE_HEIGHT_PX + LINE_PX, scale_lines)
    pixels = np.array(image)
    pixels[top:bottom, left : left + columns * width] = _cells(ratio_RC, height, width, axes.grid)
    return Picture(pixels, top, left, height, width)


def _write_lines(draw: ImageDraw.ImageDraw, x: int, y: int, lines: Sequence[str]) -> None:
    for number, line in enumerate(lines):
        write(draw, x, y + number * LINE_PX, line)


def _cells(ratio_RC: NDArray[np.float64], height: int, width: int, grid: bool) -> Pixels:
    cells = colors(ratio_RC).repeat(height, axis=0).repeat(width, axis=1)
    if grid and height >= MIN_PX_FOR_GRID:
        cells[height - 1 :: height] = BACKGROUND_RGB
    if grid and width >= MIN_PX_FOR_GRID:
        cells[:, width - 1 :: width] = BACKGROUND_RGB
    return cells


def _number_rows(draw: ImageDraw.ImageDraw, rows: int, height: int, left: int, top: int) -> None:
    """Number every row while the numbers fit, then every second, fifth, tenth ..."""
    for row in range(0, rows, _step(LINE_PX - 2, height)):
        write(draw, left - GAP_PX, top + row * height + height / 2, str(row), "rm")


def _number_columns(draw: ImageDraw.ImageDraw, axes: Axes, left: int, bottom: int, name_right: int) -> None:
    """Number columns below them while the numbers fit, as rows, after the name of the axis."""
    y, widest = bottom + LINE_PX // 2 + 1, text_width(str(max(axes.column_numbers, default=0)))
    for column in range(0, len(axes.column_numbers), _step(widest + 8, axes.cell_width)):
        middle = left + column * axes.cell_width + axes.cell_width / 2
        write(draw, middle, y, str(axes.column_numbers[column]), "mm")
    write(draw, name_right, y, axes.columns, "rm")


def _step(needed_px: int, cell_px: int) -> int:
    """Return every how many cells a number fits: 1, 2, 5, 10, 20, 50 ..."""
    factor = 1
    while True:
        for step in (factor, 2 * factor, 5 * factor):
            if step * cell_px >= needed_px:
                return step
        factor *= 10


def _draw_scale(draw: ImageDraw.ImageDraw, left: int, top: int) -> None:
    """Draw the color scale with its numbers, and the two colors that are not on it."""
    places = np.linspace(0.0, 1.0, SCALE_WIDTH_PX)
    for offset, color in enumerate(scale_colors(places).tolist()):
        draw.line([(left + offset, top), (left + offset, top + SCALE_HEIGHT_PX - 1)], tuple(color))
    for tick, place in zip(TICKS, position(np.array(TICKS)).tolist(), strict=True):
        x = left + round(place * (SCALE_WIDTH_PX - 1))
        draw.line([(x, top + SCALE_HEIGHT_PX), (x, top + SCALE_HEIGHT_PX + 2)], TEXT_RGB)
        write(draw, x, top + SCALE_HEIGHT_PX + LINE_PX // 2 + 2, f"{tick:g}", "mm")
    x = left + SCALE_WIDTH_PX + 12
    for color, text in ((ABOVE_RGB, f"above {MAX_RATIO:g}"), (NO_TOKENS_RGB, "no tokens")):
        draw.rectangle((x, top, x + SCALE_HEIGHT_PX - 1, top + SCALE_HEIGHT_PX - 1), fill=color)
        write(draw, x + SCALE_HEIGHT_PX + GAP_PX, top + SCALE_HEIGHT_PX // 2, text, "lm")
        x += SCALE_HEIGHT_PX + GAP_PX + text_width(text) + 8
