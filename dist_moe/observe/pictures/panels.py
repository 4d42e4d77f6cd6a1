"""One picture of several heat maps: title, named and numbered axes, and the color scale below.

Shapes: R rows and C columns of one heat map.
"""

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

PADDING_PX, GAP_PX = 12, 6
SCALE_WIDTH_PX, SCALE_HEIGHT_PX = 300, 16
MIN_WIDTH_PX = 620  # room for the color scale and its legend
MIN_PX_FOR_GRID = 6  # cells at least as high and wide have a line between them


@dataclass(frozen=True)
class Panel:
    """One heat map.

    Attributes:
        title: Above the map.
        ratio_RC: [R, C] float64, the load relative to the mean; 0 for no token, NaN for no value.
    """

    title: str
    ratio_RC: NDArray[np.float64]


@dataclass(frozen=True)
class Axes:
    """What all maps of a picture have in common.

    Attributes:
        rows, columns: Names of the axes.
        column_numbers: C numbers below the columns; those that do not fit are omitted.
        cell_width, cell_height: Of a cell in pixels.
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
        tops: The first row of pixels of each panel.
        left: The first column of pixels of every panel.
        axes: The axes.
    """

    pixels: Pixels
    tops: list[int]
    left: int
    axes: Axes

    def color(self, panel: int, row: int, column: int) -> tuple[int, ...]:
        """Return the color in the middle of a cell."""
        y = self.tops[panel] + row * self.axes.cell_height + self.axes.cell_height // 2
        x = self.left + column * self.axes.cell_width + self.axes.cell_width // 2
        return tuple(self.pixels[y, x].tolist())


def draw_panels(title: str, panels: Sequence[Panel], axes: Axes, scale_name: str) -> Picture:
    """Draw heat maps below each other.

    Args:
        title: Of the picture.
        panels: At least one; they may differ in R.
        axes: Names, numbers and sizes.
        scale_name: What the colors show.
    """
    most_rows = max(len(panel.ratio_RC) for panel in panels)
    columns = max(panel.ratio_RC.shape[1] for panel in panels)
    left = PADDING_PX + LINE_PX + text_width(str(most_rows - 1)) + GAP_PX
    tops, y = [], PADDING_PX + LINE_PX
    for panel in panels:
        y += LINE_PX + GAP_PX if panel.title else GAP_PX
        tops.append(y)
        y += len(panel.ratio_RC) * axes.cell_height
    texts = [text_width(title), *(left + text_width(panel.title) for panel in panels)]
    width = max(left + columns * axes.cell_width, *texts, MIN_WIDTH_PX) + 2 * PADDING_PX
    height = y + 2 * LINE_PX + GAP_PX + SCALE_HEIGHT_PX + 2 * LINE_PX + PADDING_PX
    image = Image.new("RGB", (width, height), BACKGROUND_RGB)
    draw = ImageDraw.Draw(image)
    write(draw, PADDING_PX, PADDING_PX, title)
    for panel, top in zip(panels, tops, strict=True):
        if panel.title:
            write(draw, left, top - LINE_PX, panel.title)
        _number_rows(image, draw, len(panel.ratio_RC), axes, left, top)
    _number_columns(draw, axes, left, y, columns)
    _draw_scale(draw, left, y + 2 * LINE_PX + GAP_PX, scale_name)
    pixels = np.array(image)
    for panel, top in zip(panels, tops, strict=True):
        cells = _cells(panel.ratio_RC, axes)
        pixels[top : top + len(cells), left : left + cells.shape[1]] = cells
    return Picture(pixels, tops, left, axes)


def _cells(ratio_RC: NDArray[np.float64], axes: Axes) -> Pixels:
    cells = colors(ratio_RC).repeat(axes.cell_height, axis=0).repeat(axes.cell_width, axis=1)
    if axes.grid and axes.cell_height >= MIN_PX_FOR_GRID:
        cells[axes.cell_height - 1 :: axes.cell_height] = BACKGROUND_RGB
    if axes.grid and axes.cell_width >= MIN_PX_FOR_GRID:
        cells[:, axes.cell_width - 1 :: axes.cell_width] = BACKGROUND_RGB
    return cells


def _number_rows(image: Image.Image, draw: ImageDraw.ImageDraw, rows: int, axes: Axes, left: int, top: int) -> None:
    """Number every row while the numbers fit, then every second, fifth, tenth ..., and name the axis."""
    for row in range(0, rows, _step(LINE_PX - 2, axes.cell_height)):
        write(draw, left - GAP_PX, top + row * axes.cell_height + axes.cell_height / 2, str(row), "rm")
    write_upwards(image, PADDING_PX - 4, top + rows * axes.cell_height // 2, axes.rows)


def _number_columns(draw: ImageDraw.ImageDraw, axes: Axes, left: int, bottom: int, columns: int) -> None:
    widest = text_width(str(max(axes.column_numbers, default=0)))
    for column in range(0, columns, _step(widest + 8, axes.cell_width)):
        middle = left + column * axes.cell_width + axes.cell_width / 2
        write(draw, middle, bottom + LINE_PX // 2, str(axes.column_numbers[column]), "mm")
    write(draw, left + columns * axes.cell_width / 2, bottom + LINE_PX + LINE_PX // 2, axes.columns, "mm")


def _step(needed_px: int, cell_px: int) -> int:
    """Return every how many cells a number fits: 1, 2, 5, 10, 20, 50 ..."""
    factor = 1
    while True:
        for step in (factor, 2 * factor, 5 * factor):
            if step * cell_px >= needed_px:
                return step
        factor *= 10


def _draw_scale(draw: ImageDraw.ImageDraw, left: int, top: int, name: str) -> None:
    """Draw the color scale with its numbers, and the two colors that are not on it."""
    places = np.linspace(0.0, 1.0, SCALE_WIDTH_PX)
    for offset, color in enumerate(scale_colors(places).tolist()):
        draw.line([(left + offset, top), (left + offset, top + SCALE_HEIGHT_PX - 1)], tuple(color))
    for tick, place in zip(TICKS, position(np.array(TICKS)).tolist(), strict=True):
        x = left + round(place * (SCALE_WIDTH_PX - 1))
        draw.line([(x, top + SCALE_HEIGHT_PX), (x, top + SCALE_HEIGHT_PX + 3)], TEXT_RGB)
        write(draw, x, top + SCALE_HEIGHT_PX + LINE_PX // 2 + 3, f"{tick:g}", "mm")
    write(draw, left, top + SCALE_HEIGHT_PX + LINE_PX + 4, name)
    x = left + SCALE_WIDTH_PX + 16
    for color, text in ((ABOVE_RGB, f"above {MAX_RATIO:g}"), (NO_TOKENS_RGB, "no tokens")):
        draw.rectangle((x, top, x + SCALE_HEIGHT_PX - 1, top + SCALE_HEIGHT_PX - 1), fill=color)
        write(draw, x + SCALE_HEIGHT_PX + GAP_PX, top + SCALE_HEIGHT_PX // 2, text, "lm")
        x += SCALE_HEIGHT_PX + GAP_PX + text_width(text) + 16
